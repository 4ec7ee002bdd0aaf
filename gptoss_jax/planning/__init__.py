"""Cost of training and inference without access to the devices: `gptoss plan`."""
