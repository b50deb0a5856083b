"""Transforms of rewards after scoring."""
