"""Sampling: vLLM engines in Ray actors, the weights they receive, and the producer that keeps the buffer filled."""
