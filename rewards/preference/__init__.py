"""`reward=preference`: a sequence classifier trained on preference pairs (Bradley-Terry) scores prompt and response.

`python -m rlkit.train_reward reward=preference` trains one (`training.py`).
"""
