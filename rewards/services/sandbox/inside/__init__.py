"""What runs inside a sandbox: standard library only, Python 3.10 or newer. The host sends these files along."""
