"""`reward=code`: runs model-written Python against tests in a sandbox."""
