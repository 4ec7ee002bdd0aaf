"""Trains a model: python train.py [PRESET] [--steps 500 --model.num-hidden-layers 6 ...].

The same as `gptoss train`; see `gptoss_jax/cli/train.py`.
"""

from gptoss_jax.cli import train

if __name__ == "__main__":
    train.main()
