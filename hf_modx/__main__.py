"""`python -m hf_modx` is the command `hf-modx`."""

import sys

from .cli import main

sys.exit(main())
