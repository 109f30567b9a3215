"""`python -m zoscale`, and under a launcher: `accelerate launch -m zoscale evaluate ...`."""

import sys

from zoscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
