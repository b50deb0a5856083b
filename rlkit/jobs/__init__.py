"""Runs as jobs of a Ray cluster: checks, upload, submission, log, stop."""
