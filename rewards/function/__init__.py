"""`reward=function`: a plain Python function as reward."""
