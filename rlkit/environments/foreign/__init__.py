"""Agents in an interpreter of their own."""
