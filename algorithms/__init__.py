"""Algorithms: one paper, one file that says its advantages, its loss and what it needs.

`base.py` is the contract, `surrogate.py` the policy loss with its options, `functional/` the mathematics.
"""
