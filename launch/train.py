"""Train one run: `accelerate launch launch/train.py --config launch/recipes/X.yaml optimizer.lr=1e-3`."""

import sys

from zoscale.cli import train

if __name__ == "__main__":
    sys.exit(train(command="launch/train.py"))
