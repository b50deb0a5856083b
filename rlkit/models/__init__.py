"""Models on ragged sequences: packing without padding, attention over packed tokens, chunked log-probs.

Needs only torch and transformers (no Ray, vLLM, DeepSpeed or Hydra): learners, rewards and benchmarks share it.
"""
