#!/usr/bin/env bash
# Serve a model with one process or many:  scripts/serve.sh [configs/serve/demo.yaml] [--model FOLDER] [key.path=value ...]
#
# What comes after the script's name is what `python -m megatron_ee.server` takes. The config says into how many stages
# the model is cut (inference.parallel.pipeline), and where clients find it (serving.host, serving.port). These
# environment variables say where the processes are, and nothing else:
#   NPROC_PER_NODE  processes on this node: a multiple of the stages, each of which then has so many that share its
#                   matrices. Default: one for each stage, over all nodes
#   NNODES          nodes (1)
#   NODE_RANK       this node's number, from 0
#   MASTER_ADDR     address of node 0, as the others see it; needed for more than one node
#   MASTER_PORT     its port for the other nodes (29500), which is not the one that clients know
#   PYTHON          interpreter (.venv/bin/python of this repository, otherwise python3)
#
# Several nodes: run the same line on each, with its own NODE_RANK. They see the checkpoint under the same path; node 0
# listens, and is the one to tell. SIGTERM, or Ctrl-C, lets answers end that are under way, for serving.drain seconds; a
# second Ctrl-C ends them at once, and a third one the processes. Exit status: 0, the server has ended as it was told to;
# 2, something has to change in what was asked for, or a process was lost; 143, it was told to end before it was ready;
# anything else is a failure.

set -euo pipefail

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
share_out megatron_ee.server "$@"
if ((nproc * nnodes == 1)); then
  exec "$PYTHON" -m megatron_ee.server "$@"
fi
leave_ranks_alone 15

make_status_file

# No trap does more: bash gets confused where one meets another.
told=false
num_interrupts=0
has_interrupted=0
trap 'told=true' TERM HUP USR1
trap 'told=true num_interrupts=$((num_interrupts + 1))' INT

# Called again and again: a process that has just been started may not listen yet. All that hear it go by the first one
# of node 0, which takes a SIGTERM more for the same.
tell_ranks() {
  local ranks=()
  list_ranks
  if ((num_interrupts > 2)); then
    kill -KILL "$torchrun" "${ranks[@]}" 2>/dev/null || true
  elif ((${#ranks[@]} == 0)); then
    if [[ ! -s $status_file ]]; then kill -KILL "$torchrun" 2>/dev/null || true; fi # else they have just ended
  elif ((num_interrupts == 2 && !has_interrupted)); then
    has_interrupted=1
    kill -INT "${ranks[@]}" 2>/dev/null || true
  else
    kill -TERM "${ranks[@]}" 2>/dev/null || true
  fi
}

# In a process group of its own, because a terminal's Ctrl-C would reach the processes as well as this script.
set -m
start_torchrun -m megatron_ee.server "$@"
set +m
while kill -0 "$torchrun" 2>/dev/null; do
  if $told; then tell_ranks; fi
  sleep 0.5 || true # the same signal may end it
done
of_torchrun=0
wait "$torchrun" || of_torchrun=$?
status=$of_torchrun
if [[ -s $status_file ]]; then
  read -r status <"$status_file"
elif $told; then
  status=143
fi
# Where another process fails, torchrun tells the first one to end, which it may have done well.
if ((status == 0)) && ! $told; then status=$of_torchrun; fi
exit "$status"
