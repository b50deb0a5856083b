"""POLAR: a discriminator scores how close a response is to a reference answer (arXiv 2507.05197)."""
