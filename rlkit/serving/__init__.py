"""Rewards in processes of their own: workers with deadlines, and the pool of them."""
