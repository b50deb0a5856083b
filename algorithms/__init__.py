"""Algorithms, one file per paper; `base.py` is the contract, `functional/` holds the mathematics."""
