"""`python -m gptoss_jax` is `gptoss`."""

import signal
import sys


def main() -> int:
    """Runs `gptoss`."""
    # Until `Interrupts` handles it, Ctrl-C ends the process without a traceback.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from gptoss_jax.interrupts import Interrupts

    Interrupts("gptoss").install()
    from gptoss_jax.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
