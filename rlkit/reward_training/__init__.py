"""Training reward models offline (`rlkit.train_reward reward=NAME`): one loop, one reader of rows, one report.

What is trained lives with its reward: `rewards/{polar,preference,implicit_prm}/training.py`.
"""
