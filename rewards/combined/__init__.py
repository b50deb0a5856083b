"""Several rewards combined into one: `reward=[math,polar]`."""
