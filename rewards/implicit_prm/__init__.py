"""The implicit process reward model: token rewards from log-ratios, trained only on outcomes."""
