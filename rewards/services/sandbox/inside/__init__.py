"""Runs inside a sandbox: standard library only, Python 3.10 or newer; the host sends these files along."""
