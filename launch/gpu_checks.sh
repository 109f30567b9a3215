#!/usr/bin/env bash
# Everything that is claimed of a GPU and was not measured yet, on a machine that has one (80 GB; about half an hour):
#   bash launch/gpu_checks.sh [FOLDER]
# The tests that need a GPU, the passes over weights against a copy, and whole steps beside the bare forward and MeZO's
# step at OPT-125M, 1.3B, 13B and 30B shapes with random weights. Tables go to FOLDER (default: runs/gpu-checks); a part
# that fails is named at the end, and the others go on. `PARTS="passes opt-13b"` runs these only, `SMALL=1` every command
# at a toy size, on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-runs/gpu-checks}")
. launch/environment.sh '[test]'
mkdir -p "$folder"
parts=${PARTS:-tests passes opt-125m opt-1.3b opt-13b opt-30b}
device=cuda elements=268435456 toy=()
if [ -n "${SMALL:-}" ]; then
  device=cpu elements=4096
  toy=(--model tiny --schemes lora --dtypes fp32 --q 1 --batch 2 --tokens 8 --repetitions 1)
fi
failed=()

part() {  # NAME COMMAND...
  case " $parts " in *" $1 "*) ;; *) return ;; esac
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$folder/$name.txt" || failed+=("$name")
}

steps() {  # NAME OPTIONS...
  part "$1" python launch/benchmark.py --model "$1" --ranks 1 "${@:2}" "${toy[@]}" --json "$folder/$1.json"
}

nvidia-smi > "$folder/machine.txt" 2>&1 || true
part tests python -m pytest -m gpu -p no:cacheprovider
part passes python launch/benchmark_noise.py passes --device "$device" --elements "$elements" --json "$folder/passes.json"
steps opt-125m
steps opt-1.3b --schemes lora --dtypes fp16 --q 1 --tokens 32
steps opt-13b --schemes lora --dtypes bf16 --q 1 --tokens 32  # 16 prompts of SST-2 are about so long
steps opt-30b --schemes lora --dtypes bf16 --q 1 --tokens 32

[ "${#failed[@]}" -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "results: $folder"
