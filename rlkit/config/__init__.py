"""Typed configuration behind Hydra. Importable, and usable, without torch, vLLM or Ray."""
