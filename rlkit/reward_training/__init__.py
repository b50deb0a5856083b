"""Training reward models offline (`rlkit.train_reward reward=NAME`); each model's part is in
`rewards/NAME/training.py`."""
