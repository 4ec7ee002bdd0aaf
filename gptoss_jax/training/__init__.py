"""Training: the loop, the step, its losses and optimizer, and the reports of a run."""
