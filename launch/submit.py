"""Train on a SLURM cluster: `python launch/submit.py --config launch/recipes/X.yaml --nodes 2 --gpus-per-node 8`."""

import sys

from zoscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
