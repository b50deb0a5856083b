"""Rewards computed by programs."""
