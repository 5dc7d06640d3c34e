"""`python -m wemm` is `wemm`."""

import sys

from wemm.cli import main

if __name__ == "__main__":
    sys.exit(main())
