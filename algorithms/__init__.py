"""Algorithms: each a small module that says which advantage, which loss and what it needs.

The mathematics is in `advantages.py` (numpy, ragged) and `losses.py` (torch, flat rows of response tokens).
"""
