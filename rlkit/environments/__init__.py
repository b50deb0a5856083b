"""Worlds that answer the policy: the contract, tools, games, and adapters."""
