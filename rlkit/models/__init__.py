"""Running a model on ragged sequences: packing without padding, attention over packed tokens, chunked log-probs.

Needs torch and transformers only (no Ray, vLLM, DeepSpeed or Hydra), so learners, rewards and benchmarks share it.
"""
