"""`python -m gptoss_jax` is `gptoss`."""

import sys

from gptoss_jax.cli.main import main

sys.exit(main())
