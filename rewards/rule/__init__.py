"""Rule rewards: what a program can check, in processes that can be killed where the text could make it hang."""
