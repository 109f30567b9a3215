#!/usr/bin/env bash
# One node's part of a job: the user's setup, then the launcher, which starts the ranks of this node.
#   node.sh CONFIG HEAD PORT
set -euo pipefail
folder=@folder@ config=$1 head=$2 port=$3
echo "$(date -Is) node $SLURM_NODEID of $SLURM_NNODES: $SLURMD_NODENAME, $(hostname)"

python=@python@ container=() # the setup may change them
if [ -e "$folder/setup.sh" ]; then . "$folder/setup.sh"; fi

# The launcher passes SLURM's signals on to the ranks, and gives them time to finish their step.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=@warn_seconds@ PYTHONUNBUFFERED=1
exec ${container[@]+"${container[@]}"} "$python" -m accelerate.commands.launch \
  --config_file "$folder/accelerate.yaml" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$head" --main_process_port "$port" \
  "$folder/code/train.py" --config "$config"
