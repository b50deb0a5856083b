"""What watches a run: diagnostics look at every finished step, warn, and may end the run."""
