"""`reward=preference`: a sequence classifier trained on preference pairs (Bradley-Terry) scores prompt and response."""
