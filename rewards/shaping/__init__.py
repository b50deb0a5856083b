"""Transformations of rewards after scoring."""
