"""The run's Ray, placement of actors, waiting with deadlines, and child processes."""
