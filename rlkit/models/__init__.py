"""Models on ragged sequences: packing without padding, packed attention, chunked log-probs. Depends only on torch and
transformers."""
