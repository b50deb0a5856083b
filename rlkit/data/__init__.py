"""Where prompts come from: the embedded arithmetic task, a user's file or data set, and the order they are drawn in."""
