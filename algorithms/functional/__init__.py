"""Advantages, returns, losses and credit as pure functions."""
