"""Advantages, returns, losses and credit as pure functions: no configuration, no state."""
