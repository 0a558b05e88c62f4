"""`python -m nestopt`."""

import sys

from nestopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
