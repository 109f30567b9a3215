#!/usr/bin/env bash
# Everything that must hold, quick checks first. Makes its own environment in .venv.
#   bash tests/run.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh '[dev]'

ruff check zoscale launch tests
ruff format --check zoscale launch tests
mypy
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
if [ "$#" -gt 0 ]; then
  exec python -m pytest "$@"
fi
failed=0
slowest=(--durations 12 --durations-min 10)
python -m pytest -m quick --numprocesses 2 --dist loadfile "${slowest[@]}" || failed=1
python -m pytest -m jobs --numprocesses 3 --dist loadfile --no-loadscope-reorder "${slowest[@]}" || failed=1
python -m pytest -m deadlines --numprocesses 2 --dist loadfile "${slowest[@]}" || failed=1
python -m pytest -m measured "${slowest[@]}" || failed=1
exit "$failed"
