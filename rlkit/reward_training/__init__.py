"""Training reward models offline (`rlkit.train_reward reward=NAME`): the loop, the rows, the report.

The models live with their rewards: `rewards/{polar,preference,implicit_prm}/training.py`.
"""
