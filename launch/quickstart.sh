#!/usr/bin/env bash
# The main job on an embedded default: a bundled OPT, LoRA, JAGUAR Muon, ZeRO-3 over all GPUs or two CPU processes.
#   bash launch/quickstart.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh ''  # no extras; without an argument it would see those of this script

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  config=launch/accelerate/gpu.yaml processes=$gpus
else
  config=launch/accelerate/cpu.yaml processes=2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
accelerate launch --config_file "$config" --num_processes "$processes" \
  launch/train.py --config launch/recipes/quickstart.yaml overwrite=true "$@"
