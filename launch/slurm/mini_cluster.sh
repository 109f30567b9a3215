#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine: slurmctld, two slurmd, munged, all in one folder, without systemd.
#   bash launch/slurm/mini_cluster.sh start DIR    then: export SLURM_CONF=DIR/slurm.conf
#   bash launch/slurm/mini_cluster.sh stop DIR
# Needs root and the programs of Debian's slurm-wlm and munge. A cluster of its own, for tests and for trying things out.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"
action=${1:-} dir=$(realpath -m "${2:?the folder of the cluster}")
conf=$dir/slurm.conf

# Below the range from which the kernel gives connections theirs, and above the ports that the first 1,000 jobs take.
free_ports() {
  python3 - "$1" <<'PYTHON'
import random, socket, sys
sockets = []
while len(sockets) < int(sys.argv[1]):
    sockets.append(socket.socket())
    try:
        sockets[-1].bind(("127.0.0.1", random.randrange(21_000, 32_000)))
    except OSError:
        sockets.pop()
print(*(one.getsockname()[1] for one in sockets))
PYTHON
}

write_conf() {
  local host=$(hostname -s) user=$(id -un) control first second
  read -r control first second < <(free_ports 3)
  cat >"$conf" <<CONF
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$control
SlurmUser=$user
SlurmdUser=$user
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=600
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$first CPUs=$(nproc) Gres=gpu:2
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$second CPUs=$(nproc) Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=mini Nodes=node1,node2 Default=YES State=UP PriorityTier=1 GraceTime=30 OverSubscribe=EXCLUSIVE
PartitionName=urgent Nodes=node1,node2 State=UP PriorityTier=2 PreemptMode=OFF OverSubscribe=EXCLUSIVE
CONF
  touch "$dir"/gpu{0,1} && echo "Name=gpu File=$dir/gpu[0-1]" >"$dir/gres.conf" # in name only
}

start() {
  mkdir -p "$dir/state" "$dir/node1" "$dir/node2"
  chmod 755 "$dir"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  write_conf
  export SLURM_CONF=$conf
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
  slurmctld -c -i
  for node in node1 node2; do slurmd -N "$node"; done
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" != 2 ] || return 0
    sleep 0.2
  done
  echo "the nodes did not come up within 20 s; see $dir/*.log" >&2
  stop
  exit 1
}

stop() {
  local pids
  pids=$(cat "$dir"/{node1,node2,slurmctld,munged}.pid 2>/dev/null) || true
  [ -n "$pids" ] || return 0
  export SLURM_CONF=$conf
  scancel --user="$(id -un)" 2>/dev/null || true
  for _ in $(seq 100); do
    [ -n "$(squeue --noheader 2>/dev/null)" ] || break
    sleep 0.1
  done
  kill $pids 2>/dev/null || true
  for _ in $(seq 20); do
    kill -0 $pids 2>/dev/null || return 0 # all are gone
    sleep 0.1
  done
  kill -9 $pids 2>/dev/null || true
}

case $action in
  start | stop) "$action" ;;
  *) echo "usage: mini_cluster.sh start|stop DIR" >&2 && exit 2 ;;
esac
