"""Training: loop, step, losses, optimizer, and reports."""
