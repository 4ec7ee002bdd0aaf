"""Trains a model: python train.py [PRESET] [--steps 500 --model.num-hidden-layers 6 ...].

The same as `gptoss train`; see `gptoss_jax/cli/train.py`.
"""

import signal

if __name__ == "__main__":
    # Until `Interrupts` handles it, Ctrl-C ends the process without a traceback.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from gptoss_jax.interrupts import Interrupts

    Interrupts("train.py").install()
    from gptoss_jax.cli import train

    train.main()
