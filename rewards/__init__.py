"""Rewards, chosen with `reward=...` and imported through the configuration's `_target_`.

Modules here import torch, vLLM or math-verify only when a reward starts: validating a configuration must stay cheap.
"""
