"""Algorithms, one file per paper; `base.py` is the contract, `functional/` the mathematics."""
