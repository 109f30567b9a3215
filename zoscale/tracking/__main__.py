"""`python -m zoscale.tracking RUN_DIR [URI]`: send a run's metrics to MLflow later."""

import argparse
from pathlib import Path

from zoscale.tracking.tracker import import_run

parser = argparse.ArgumentParser(description="Send a run's metrics.jsonl to MLflow.")
parser.add_argument("run_dir", type=Path)
parser.add_argument("uri", nargs="?")
arguments = parser.parse_args()
print(import_run(arguments.run_dir, uri=arguments.uri))
