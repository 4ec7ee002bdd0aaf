"""Cost of a training step on devices that need not be here: `gptoss plan`."""
