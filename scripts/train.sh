#!/usr/bin/env bash
# Train on one node or many:  scripts/train.sh CONFIG [key.path=value ...]
#
# The config says what to train. These environment variables say where, and nothing else:
#   NPROC_PER_NODE  processes on this node. Default: as many as parallel.tensor x pipeline x data asks for; where
#                   data is auto, one for each GPU; without enough GPUs for one copy of the model, as many as that
#                   takes (`device: auto` then takes the CPU)
#   NNODES          nodes (1)
#   NODE_RANK       this node's number, from 0. Optional: node 0 hosts the rendezvous. Without it, the node whose
#                   address MASTER_ADDR is does
#   MASTER_ADDR     address of that node, as the others see it; needed for more than one node
#   MASTER_PORT     its port (29500)
#   RDZV_ID         what the nodes of one start call it, all the same (the run's name); SLURM's launcher gives the job's
#   SHUTDOWN_TIMEOUT  seconds that ranks have to save when they are told to stop (120)
#   MAX_RESTARTS    how often all ranks are started again, from the newest checkpoint, when one has failed (0). With
#                   several nodes give all of them the same number: each starts its own ranks
#   PYTHON          interpreter (.venv/bin/python of this repository, otherwise python3)
#
# Several nodes: run the same line on each, with its own NODE_RANK, for example
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 scripts/train.sh configs/train/demo.yaml
# They share the run's folder and the data's. Rank 0, which writes the log, may be on any of them.
#
# Paths in the config are relative to where you call this from. SIGTERM, SIGUSR1 and Ctrl-C let all ranks finish their
# step, save, and stop. Exit status: 0, the run is at its end; 75, it saved and stopped before, start it again to go on;
# 2, something has to change: in the config, or on a disk that has no room for the last checkpoint; anything else is a
# failure.

set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
shutdown_timeout=${SHUTDOWN_TIMEOUT:-120}
[[ $shutdown_timeout =~ ^[1-9][0-9]*$ ]] || fail "SHUTDOWN_TIMEOUT: $shutdown_timeout is not a number of seconds"

# A wrong config is one message here; from inside torchrun it would be a page.
config=$("$PYTHON" -m megatron_ee.config "$@") || exit
read -r name device tensor copy data < <("$PYTHON" -c '
import sys, yaml
config = yaml.safe_load(sys.stdin)
parallel = config["parallel"]
tensor = parallel["tensor"]
print(config["name"], config["device"], tensor, tensor * parallel["pipeline"], parallel["data"])' <<<"$config")

default_nproc() {
  local gpus=0 wanted
  if [[ $data != auto ]]; then
    echo $(((copy * data + nnodes - 1) / nnodes))
    return
  fi
  if [[ $device != cpu ]]; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
  fi
  wanted=$(((copy + nnodes - 1) / nnodes))
  echo $((gpus > wanted ? gpus : wanted))
}
nproc=${NPROC_PER_NODE:-$(default_nproc)}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE: $nproc is not a number of processes"
"$PYTHON" -m megatron_ee.config --world-size $((nproc * nnodes)) "$@" >/dev/null || exit

launch=(--nproc-per-node "$nproc" --nnodes "$nnodes")
leave_ranks_alone "$shutdown_timeout"
if ((nnodes == 1)); then
  launch+=(--standalone)
else
  [[ -n ${MASTER_ADDR-} ]] || fail "MASTER_ADDR: $nnodes nodes need the address of the one that hosts the rendezvous"
  launch+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${RDZV_ID:-$name}")
  if [[ -n ${NODE_RANK-} ]]; then
    launch+=(--rdzv-conf "is_host=$((NODE_RANK == 0 ? 1 : 0))")
  fi
fi

# shellcheck source=scripts/env.sh
source "$root/scripts/env.sh" "$tensor"

max_restarts=${MAX_RESTARTS:-0}
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS: $max_restarts is not a number of restarts"

make_status_file

# No trap does more: bash gets confused where one meets another.
told='' # the first signal that asks for the end
num_interrupts=0
trap 'told=${told:-TERM}' TERM
trap 'told=${told:-HUP}' HUP
trap 'told=${told:-USR1}' USR1
trap 'told=${told:-INT} num_interrupts=$((num_interrupts + 1))' INT

# Start all ranks of this node, and take their own word for how it went: torchrun ends with 1, whatever they had to say.
start_ranks() {
  local deadline='' signal=TERM
  has_no_ranks=false
  start_torchrun "$root/pretrain_ee.py" "$@"
  while kill -0 "$torchrun" 2>/dev/null; do
    if [[ -n $told ]]; then stop_ranks; fi
    sleep 0.5 || true # the same signal may end it
  done
  status=0
  wait "$torchrun" || status=$? # its own, which bash remembers
  if [[ -s $status_file ]]; then
    read -r status <"$status_file"
  elif $has_no_ranks; then
    say "SIG$told came before there was anything to save"
    status=75
  fi
}

# Tell the ranks to stop. Called again and again: one that has just been started may not listen yet.
stop_ranks() {
  local ranks=()
  if [[ -z $deadline ]]; then
    deadline=$((SECONDS + shutdown_timeout))
    say "SIG$told: the ranks finish their step, save, and stop; Ctrl-C twice ends them at once"
  fi
  list_ranks
  if ((${#ranks[@]} == 0 && SECONDS < deadline)); then
    if [[ ! -s $status_file ]]; then # else they have just ended
      has_no_ranks=true
      kill -KILL "$torchrun" 2>/dev/null || true
    fi
  elif ((num_interrupts > 1)); then
    kill -KILL "$torchrun" 2>/dev/null || true # and they end with it
  elif ((SECONDS >= deadline)); then
    say "the ranks have not ended within SHUTDOWN_TIMEOUT=$shutdown_timeout seconds"
    kill -KILL "$torchrun" 2>/dev/null || true
  else
    # A second SIGINT would end ranks that Ctrl-C has reached already, and a SIGTERM those that outlive another one.
    if [[ $told != TERM ]]; then signal=USR1; fi
    kill "-$signal" "${ranks[@]}" 2>/dev/null || true
    signal=USR1
  fi
}

# Not torchrun's own --max-restarts: its ranks would meet the addresses that those before them left in its store.
start_ranks "$@"
for ((restart = 1; restart <= max_restarts; restart++)); do
  [[ -z $told && $status != 0 && $status != 2 && $status != 75 ]] || break
  say "the ranks have failed with status $status; restart $restart of $max_restarts"
  start_ranks "$@"
done
exit "$status"
