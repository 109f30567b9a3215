"""The run directory: made once, never mixed with another run's, its files written whole."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoscale.config import ConfigError


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=2, default=str) + "\n")
    aside.replace(path)


def claim(run_dir: Path, overwrite: bool) -> None:
    """Make a new run directory.

    Raises:
        ConfigError: if a run with this configuration is there already.
    """
    if (run_dir / "config.yaml").exists():
        if not overwrite:
            raise ConfigError(
                "a configuration that has not run yet",
                f"a run in {run_dir}",
                "change it, or overwrite=true to start again",
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
