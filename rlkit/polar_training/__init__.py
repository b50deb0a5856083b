"""Training a POLAR discriminator: triplets (reference, chosen, rejected), and the pair loss on them.

Pre-training and fine-tuning share everything but the data (arXiv 2507.05197, equations 7 and 8).
"""
