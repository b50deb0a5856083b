"""Agents that run in a separate interpreter."""
