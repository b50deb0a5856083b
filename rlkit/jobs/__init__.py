"""Runs as jobs of a Ray cluster: what is checked and sent before one starts, and how it is followed and ended."""
