# shellcheck shell=bash
# What scripts/train.sh, decode.sh and serve.sh have in common; they source it first:  source launch.sh
#
# It leaves `root`, `nnodes` and PYTHON, and lets the ranks find the package beside this folder, installed or not: what is
# asked before they start has to be the same one.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

say() { echo "${0##*/}: $1" >&2; }

fail() {
  say "$1"
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

# For a module that decodes: how many processes share the model, into `nproc`, and torchrun's options, into `launch`.
#   share_out MODULE [argument ...]
share_out() {
  local module=$1 stages
  shift
  # A wrong option or config is one message here; from inside torchrun it would be a page.
  stages=$("$PYTHON" -m "$module" --stages "$@") || exit
  nproc=${NPROC_PER_NODE:-$(((stages + nnodes - 1) / nnodes))}
  [[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE: $nproc is not a number of processes"
  ((nproc * nnodes % stages == 0)) ||
    fail "NPROC_PER_NODE: $((nproc * nnodes)) processes do not divide into inference.parallel.pipeline=$stages stages"
  if ((nproc * nnodes == 1)); then return; fi

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
}

# Options for a torchrun that leaves its ranks to themselves when it is told to end, and gives those that are left, once
# one has failed, so many seconds:  leave_ranks_alone SECONDS
leave_ranks_alone() {
  # An older torchrun knows neither, and listens to SIGTERM, SIGINT and SIGHUP always; torch 2.11's knows the first.
  local options
  options=$("$PYTHON" -c '
import sys
from importlib.util import find_spec
from pathlib import Path
folder = Path(find_spec("torch").submodule_search_locations[0])  # without an import, which takes seconds
known = (folder / "distributed" / "run.py").read_text()
print(*(part for pair in zip(sys.argv[1::2], sys.argv[2::2]) if f"\"{pair[0]}\"" in known for part in pair))' \
    --signals-to-handle SIGQUIT --shutdown-timeout "$1") || exit
  read -ra options <<<"$options"
  launch+=("${options[@]}")
}

# Where the ranks leave their own word for how it went, because torchrun ends with 1 whatever they had to say.
make_status_file() {
  status_file=$(mktemp)
  trap 'rm -f "$status_file"' EXIT
}

# Start torchrun with `launch`, in the background as `torchrun`:  start_torchrun PROGRAM [argument ...]
start_torchrun() {
  : >"$status_file"
  # Deaf, because torchrun that is told twice, by SLURM and by a script say, leaves its ranks while they have work to end.
  (
    trap '' TERM INT HUP USR1
    EXIT_STATUS_FILE=$status_file exec "$PYTHON" -m torch.distributed.run "${launch[@]}" "$@"
  ) &
  torchrun=$!
}

# torchrun's children, into `ranks`.
# shellcheck disable=SC2034  # which is local to who asks
list_ranks() {
  if [[ -d /proc/self ]]; then
    read -ra ranks <"/proc/$torchrun/task/$torchrun/children" || true # no end of line
  else
    read -ra ranks < <(pgrep -P "$torchrun" | tr '\n' ' ') || true
  fi 2>/dev/null
}
