#!/usr/bin/env bash
# Everything that is claimed of a GPU and was not measured yet, on a machine that has one (80 GB):
#   bash launch/gpu_checks.sh [FOLDER]
# Whole steps beside the bare forward and MeZO's step at OPT shapes with random weights, the passes over weights against
# a copy, and the tests that need a GPU; the most important first. Each part takes a few minutes and is ended after
# LIMIT seconds (600); one that fails is named, and the others go on. Tables go to FOLDER (default: runs/gpu-checks). At
# the end each aim is printed as passed, failed or not measured, and the tests that were skipped are listed.
#   PARTS="opt-13b passes"   these only, in any number of calls: what is in FOLDER counts for the verdicts
#   SMALL=1                  every command at a toy size, on any machine
#   PYTHON=PATH              an interpreter
# Where that (or python, or python3) imports zoscale's dependencies and pytest already, it is used as it is, and nothing
# is installed: the machine needs no network. Else an environment is made in .venv.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-runs/gpu-checks}")
python=${PYTHON:-$(command -v python || command -v python3)}
if { [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ]; } && "$python" -c 'import zoscale.run, deepspeed, pytest' > /dev/null 2>&1; then
  echo "as it is: $("$python" -c 'import sys, torch; print(f"{sys.executable}, torch {torch.__version__}")')"
else
  . launch/environment.sh '[test]' || { echo "no environment: see the message above"; exit 1; }
  python=python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$folder"
default=(opt-13b opt-13b-blocks opt-13b-cuda_graphs passes opt-1.3b tests opt-13b-ranks opt-125m opt-125m-fp32 opt-30b)
parts=${PARTS:-${default[*]}}
device=cuda elements=268435456 toy=()
if [ -n "${SMALL:-}" ]; then
  device=cpu elements=4096
  toy=(--model tiny --schemes lora --dtypes fp32 --q 1 --batch 2 --tokens 8 --repetitions 1)
fi
for name in $parts; do
  case " ${default[*]} " in *" $name "*) ;; *) echo "expected PARTS of: ${default[*]}; got $name"; exit 2 ;; esac
done
failed=()

part() {  # NAME COMMAND...
  case " $parts " in *" $1 "*) ;; *) return ;; esac
  local name=$1
  shift
  echo "== $name: $*"
  rm -f "$folder/$name.json"
  timeout "${LIMIT:-600}" "$@" 2>&1 | tee "$folder/$name.txt" || failed+=("$name")
}

steps() {  # NAME MODEL OPTIONS...
  part "$1" "$python" launch/benchmark.py --model "$2" --ranks 1 "${@:3}" ${toy[@]+"${toy[@]}"} --json "$folder/$1.json"
}

nvidia-smi > "$folder/machine.txt" 2>&1 || true
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
prompts=(--schemes lora --q 1 --tokens 32)  # 16 prompts of SST-2 are about so long
steps opt-13b opt-13b --dtypes bf16 "${prompts[@]}"
for name in blocks cuda_graphs; do
  [ "$device $name" = "cpu cuda_graphs" ] || steps "opt-13b-$name" opt-13b --dtypes bf16 "${prompts[@]}" --compile "$name"
done
part passes "$python" launch/benchmark_noise.py passes --device "$device" --elements "$elements" --json "$folder/passes.json"
steps opt-1.3b opt-1.3b --dtypes fp16 "${prompts[@]}"
part tests "$python" -m pytest -m gpu -p no:cacheprovider $(grep -l '^@pytest.mark.gpu' tests/*.py)
[ "$gpus" -lt 2 ] || steps opt-13b-ranks opt-13b --dtypes bf16 "${prompts[@]}" --ranks "$gpus"
steps opt-125m opt-125m --dtypes bf16
steps opt-125m-fp32 opt-125m --dtypes fp32
steps opt-30b opt-30b --dtypes bf16 "${prompts[@]}"

"$python" launch/gpu_verdicts.py "$folder"
[ "${#failed[@]}" -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
echo "results: $folder"
