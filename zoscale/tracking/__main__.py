"""`python -m zoscale.tracking RUN_DIR [URI]`: send a run's metrics to MLflow later."""

import argparse
from pathlib import Path

from zoscale.tracking.mlflow_store import shown, store_uri
from zoscale.tracking.tracker import import_run


def _main() -> None:
    """Print the run's id; exit with status 2 for a folder that is no run, 1 where the store fails."""
    parser = argparse.ArgumentParser(
        prog="python -m zoscale.tracking", description="Send a run's metrics.jsonl to MLflow."
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("uri", nargs="?")
    arguments = parser.parse_args()
    folder, uri = arguments.run_dir, arguments.uri
    lacking = [name for name in ("tracking.json", "metrics.jsonl") if not (folder / name).is_file()]
    if lacking:
        got = f"{folder} without {lacking[0]}"
        parser.exit(2, f"{parser.prog}: error: expected the folder of a run, got {got}: check the path\n")
    try:
        print(import_run(folder, uri=uri))
    except Exception as error:  # whatever MLflow and its store raise
        reason = shown(f"{store_uri(folder, uri)}: {type(error).__name__}: {str(error).strip()}")
        parser.exit(1, f"{parser.prog}: error: nothing is lost; once the store answers, run it again: {reason}\n")


if __name__ == "__main__":
    _main()
