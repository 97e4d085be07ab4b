#!/usr/bin/env bash
# Decode with one process or many:  scripts/decode.sh --checkpoint RUN [option ...] [CONFIG] [key.path=value ...]
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

# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
share_out megatron_ee.inference "$@"
if ((nproc * nnodes == 1)); then
  exec "$PYTHON" -m megatron_ee.inference "$@"
fi

make_status_file
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
