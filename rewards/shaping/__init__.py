"""Transforms of rewards after scoring: steps with options, and chains of steps."""
