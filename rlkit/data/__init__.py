"""Where prompts come from: the embedded arithmetic task or a user's data, and the order they are drawn in."""
