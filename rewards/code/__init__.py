"""`reward=code`: runs model-written Python against tests, isolated from everything that could tell it the verdict."""
