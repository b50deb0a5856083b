"""Worlds that respond to the policy: the contract, tools, games, and adapters."""
