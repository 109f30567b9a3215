"""`python -m zoscale`, and under a launcher: `accelerate launch -m zoscale evaluate ...`."""

from zoscale.cli import leave, main

if __name__ == "__main__":
    leave(main())
