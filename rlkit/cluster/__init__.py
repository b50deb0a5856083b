"""The run's Ray session, placement of actors, waiting with deadlines, and child processes."""
