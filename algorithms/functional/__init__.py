"""Advantages, returns, losses and credit assignment as pure functions."""
