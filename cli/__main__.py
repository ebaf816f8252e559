"""``python -m fedzo.cli`` is `fedzo`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
