"""Several rewards as one: `reward=[math,polar]`."""
