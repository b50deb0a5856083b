"""Training reward models offline (`rlkit.train_reward reward=NAME`); the part for each model is in
`rewards/NAME/training.py`."""
