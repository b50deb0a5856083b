"""Isolated execution of model-written code. Inside the sandbox only `inside/` runs, on the standard library."""
