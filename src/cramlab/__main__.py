"""`python -m cramlab`."""

import sys

from cramlab.cli import main

sys.exit(main())
