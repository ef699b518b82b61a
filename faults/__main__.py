"""The command: `python -m faults` runs all parts, `python -m faults PART --only NAME` one case again."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # names of models that do not exist are not asked for

from faults.campaign import main

if __name__ == "__main__":
    sys.exit(main())
