"""Runs as jobs on a Ray cluster: checks, upload, submission, log, stop."""
