"""`python -m cramlab`."""

import sys

from cramlab.cli.main import main

sys.exit(main())
