"""Services that several rewards use: HTTP and chat clients, likelihoods, the sandbox."""
