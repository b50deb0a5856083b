"""What several rewards need: HTTP and chat clients, likelihoods under a language model, the sandbox."""
