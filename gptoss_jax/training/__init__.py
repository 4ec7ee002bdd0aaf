"""The way of a batch: the loop, the step, its losses and optimiser, and what a run reports."""
