"""`reward=remote`: a reward that another process serves over HTTP, and the messages both sides exchange."""
