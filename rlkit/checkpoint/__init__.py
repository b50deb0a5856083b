"""Checkpoints: written aside, sealed with a manifest, found again, and refused where they belong to another run."""
