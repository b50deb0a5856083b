"""`rlkit doctor`: what this machine and this installation have and lack."""
