#!/usr/bin/env bash
# Decode with one process or many:  scripts/serve.sh --checkpoint RUN [option ...] [CONFIG] [key.path=value ...]
#
# What comes after the script's name is what `python -m megatron_ee.inference` takes. The config says into how many
# stages the model is cut (inference.parallel.pipeline). These environment variables say where, and nothing else:
#   NPROC_PER_NODE  processes on this node: a multiple of the stages, each of which then has so many that share its
#                   matrices. Default: one for each stage, over all nodes
#   NNODES          nodes (1)
#   NODE_RANK       this node's number, from 0
#   MASTER_ADDR     address of node 0, as the others see it; needed for more than one node
#   MASTER_PORT     its port (29500)
#   PYTHON          interpreter (.venv/bin/python of this repository, otherwise python3)
#
# Several nodes: run the same line on each, with its own NODE_RANK. They see the checkpoint under the same path; node 0
# prints. Exit status: 0, all is decoded; 2, something has to change in what was asked for, or a stage was lost; anything
# else is a failure.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

fail() {
  echo "serve.sh: $1" >&2
  exit 2
}

case ${1-} in
  -h | --help) usage && exit ;;
  '') usage >&2 && exit 2 ;;
esac

if [[ -z ${PYTHON-} ]]; then
  PYTHON=python3
  if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
nnodes=${NNODES:-1}
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES: $nnodes is not a number of nodes"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

# A wrong option or config is one message here; from inside torchrun it would be a page.
stages=$("$PYTHON" -m megatron_ee.inference --stages "$@") || exit
nproc=${NPROC_PER_NODE:-$(((stages + nnodes - 1) / nnodes))}
[[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE: $nproc is not a number of processes"
((nproc * nnodes % stages == 0)) ||
  fail "NPROC_PER_NODE: $((nproc * nnodes)) processes do not divide into inference.parallel.pipeline=$stages stages"

if ((nproc * nnodes == 1)); then
  exec "$PYTHON" -m megatron_ee.inference "$@"
fi

launch=(--nproc-per-node "$nproc" --nnodes "$nnodes")
if ((nnodes == 1)); then
  launch+=(--standalone)
else
  [[ -n ${MASTER_ADDR-} ]] || fail "MASTER_ADDR: $nnodes nodes need the address of node 0"
  [[ -n ${NODE_RANK-} ]] || fail "NODE_RANK: which of the $nnodes nodes is this?"
  launch+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

# shellcheck source=scripts/env.sh
source "$root/scripts/env.sh" "$((nproc * nnodes / stages))"

status_file=$(mktemp)
trap 'rm -f "$status_file"' EXIT
EXIT_STATUS_FILE=$status_file "$PYTHON" -m torch.distributed.run "${launch[@]}" -m megatron_ee.inference "$@" <&0 &
torchrun=$!
# In the foreground it would keep this script from hearing what it is told.
told=0
trap 'told=143; kill -TERM "$torchrun" 2>/dev/null || true' TERM HUP
trap 'told=130; kill -TERM "$torchrun" 2>/dev/null || true' INT
status=0
while kill -0 "$torchrun" 2>/dev/null; do
  status=0
  wait "$torchrun" || status=$? # or a signal's, and then once more
done
# torchrun ends with 1, whatever its ranks had to say; the first of this node leaves it here
if [[ -s $status_file ]]; then read -r status <"$status_file"; fi
exit $((told ? told : status))
