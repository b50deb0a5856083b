"""POLAR: how close a response is to a reference answer, scored by a discriminator (arXiv 2507.05197)."""
