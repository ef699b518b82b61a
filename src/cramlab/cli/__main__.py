"""`python -m cramlab.cli`, the same as the command `cramlab`."""

import sys

from cramlab.cli.main import main

sys.exit(main())
