"""Ray: starting one of our own on the loopback interface, joining another's, and leaving nothing behind."""
