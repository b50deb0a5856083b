"""Training reward models offline: `python -m rlkit.train_reward reward=NAME`, one backend class per reward."""
