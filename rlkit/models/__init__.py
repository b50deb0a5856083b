"""Models on ragged sequences: packing without padding, packed attention, chunked log-probs. torch and transformers
only."""
