"""`python -m gptoss_jax` is `gptoss`."""

import os
import sys


def main() -> int:
    """Runs `gptoss`. Ctrl-C while its modules are imported ends it without a traceback."""
    try:
        from gptoss_jax.cli.main import main
    except KeyboardInterrupt:
        print("\ngptoss: interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    return main()


if __name__ == "__main__":
    sys.exit(main())
