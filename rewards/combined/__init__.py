"""Several rewards as one: weights, routing by prompt, ways to combine, shaping. `reward=[math,polar]` makes one."""
