"""`reward=preference`: scores by a sequence classifier that was trained on preference pairs (Bradley-Terry)."""
