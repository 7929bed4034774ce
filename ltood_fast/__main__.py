"""`python -m ltood_fast` is `ltood`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
