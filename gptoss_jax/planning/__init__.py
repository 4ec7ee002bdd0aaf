"""Cost of a training step, without access to the devices: `gptoss plan`."""
