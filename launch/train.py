"""Train one run: `accelerate launch launch/train.py --config launch/recipes/X.yaml optimizer.lr=1e-3`."""

from zoscale.cli import leave, train

if __name__ == "__main__":
    leave(train(command="launch/train.py"))
