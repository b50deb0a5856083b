"""Code that runs inside a sandbox: standard library only, Python 3.10 or newer; the host copies these files there."""
