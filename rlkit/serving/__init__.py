"""Rewards in their own processes: workers with deadlines, and a pool of them."""
