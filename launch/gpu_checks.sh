#!/usr/bin/env bash
# Everything that is claimed of a GPU and was not measured yet, on a machine that has one (80 GB; about half an hour):
#   bash launch/gpu_checks.sh [FOLDER]
# The tests that need a GPU, the passes over weights against a copy, and whole steps beside the bare forward and MeZO's
# step at OPT-125M, 1.3B, 13B and 30B shapes with random weights. Tables go to FOLDER (default: runs/gpu-checks); a part
# that fails is named at the end, and the others go on. `SMALL=1` runs every command at a toy size, on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-runs/gpu-checks}")
set --
. launch/environment.sh '[test]'
mkdir -p "$folder"
failed=()

part() {  # NAME COMMAND...
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$folder/$name.txt" || failed+=("$name")
}

steps() {  # NAME MODEL OPTIONS...
  local name=$1 model=$2
  shift 2
  [ -z "${SMALL:-}" ] || { model=tiny; set -- "$@" --schemes lora --dtypes fp32 --q 1 --batch 2 --tokens 8 --repetitions 1; }
  part "$name" python launch/benchmark.py --model "$model" "$@" --json "$folder/$name.json"
}

if [ -z "${SMALL:-}" ]; then
  device=cuda elements=268435456
  part tests python -m pytest -m gpu -p no:cacheprovider
else
  device=cpu elements=4096
fi
nvidia-smi > "$folder/machine.txt" 2>&1 || true
part passes python launch/benchmark_noise.py passes --device "$device" --elements "$elements" --json "$folder/passes.json"
steps opt-125m opt-125m --ranks 1
steps opt-1.3b opt-1.3b --ranks 1 --schemes lora --dtypes fp16 --q 1 --tokens 32
steps opt-13b opt-13b --ranks 1 --schemes lora --dtypes bf16 --q 1 --tokens 32  # 16 prompts of SST-2 are about so long
steps opt-30b opt-30b --ranks 1 --schemes lora --dtypes bf16 --q 1 --tokens 32

[ "${#failed[@]}" -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "results: $folder"
