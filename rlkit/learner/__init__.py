"""The policy learner: a DeepSpeed engine on one or more ranks, fed with ragged micro-batches.

`policy.py` and what it imports need torch, transformers and DeepSpeed only; Ray appears in `worker.py` alone.
"""
