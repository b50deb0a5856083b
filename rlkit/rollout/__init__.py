"""Sampling: vLLM engines in Ray actors, the weights they receive, and the episodes that they play."""
