"""What several rewards need: HTTP and chat clients, likelihoods, the sandbox."""
