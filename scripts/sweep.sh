#!/usr/bin/env bash
# Train several runs of one config, which differ by overrides:
#   scripts/sweep.sh [--dry-run] CONFIG FILE                                    one after another, here
#   scripts/sweep.sh [--dry-run] --slurm [SBATCH_OPTION ... --] CONFIG FILE     as the tasks of one SLURM job array
#
# Each line of FILE holds the key.path=value ... of one run, quoted as in a shell; empty lines and those that begin
# with # are left out:
#   optimizer.lr=1e-3
#   optimizer.lr=3e-3 'exits.weight_schedule={shape: linear, warmup_iters: 60}' name=steep
# The run of line 1 is called NAME-1, where NAME is the config's, unless the line gives a name. Each has a folder of its
# own. All lines are checked before any run starts; --dry-run prints what would be started.
#
# Environment variables are those of scripts/train.sh and scripts/train.slurm, and with --slurm
#   AT_ONCE   how many runs may go at a time (all)
#
# SIGTERM, SIGUSR1 and Ctrl-C save the run that goes, and start no other. The same command again goes on: what is
# complete is passed over. Exit status: 0, all runs are at their end (or submitted); 2, nothing was started, because
# something has to change; 75, some saved and stopped before their end; 1, some failed.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

fail() {
  echo "sweep.sh: $1" >&2
  exit 2
}

is_dry_run=false is_slurm=false options=()
case ${1-} in
  -h | --help) usage && exit ;;
  '') usage >&2 && exit 2 ;;
  --dry-run) is_dry_run=true && shift ;;
esac
if [[ ${1-} == --slurm ]]; then
  is_slurm=true && shift
  if [[ ${1-} == -* ]]; then
    while (($#)) && [[ $1 != -- ]]; do options+=("$1") && shift; done
    (($#)) || fail "a -- ends sbatch's options, and CONFIG FILE follow"
    shift
  fi
fi
[[ $# == 2 && $1 != -* ]] || fail "expected CONFIG FILE; see scripts/sweep.sh --help"
config=$1 file=$2

if [[ -z ${PYTHON-} ]]; then
  PYTHON=python3
  if [[ -x $root/.venv/bin/python ]]; then PYTHON=$root/.venv/bin/python; fi
fi
plan=$(PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" "$root/tools/plan_sweep.py" "$config" "$file") || exit
mapfile -t runs <<<"$plan"  # each quoted for a shell

submit() {
  local run words arguments=()
  for run in "${runs[@]}"; do
    eval "words=($run)"
    arguments+=(-- "${words[@]}")
  done
  name=$(basename "$file")
  options=(--job-name="${name%.*}" --array="1-${#runs[@]}${AT_ONCE:+%$AT_ONCE}" "${options[@]}")
  set -- sbatch "${options[@]}" "$root/scripts/train.slurm" "$config" "${arguments[@]}"
  if $is_dry_run; then
    printf '%q ' "$@" && echo
  else
    exec "$@"
  fi
}

# SIGUSR1 for all of them: scripts/train.sh, in the background, is deaf to Ctrl-C.
stop() {
  is_stopped=true
  if [[ -n $training ]]; then kill -USR1 "$training" 2>/dev/null || true; fi
}

train() {
  local status=0
  "$root/scripts/train.sh" "$@" &
  training=$!
  wait "$training" || status=$?
  while kill -0 "$training" 2>/dev/null; do  # a signal has ended the wait, not the run
    status=0
    wait "$training" || status=$?
  done
  training=''
  if $is_stopped && [[ $status == @(138|143) ]]; then status=75; fi  # told before it had begun
  return "$status"
}

train_all() {
  local run words status worst=0 summary=()
  is_stopped=false training=''
  trap stop TERM INT HUP USR1
  for run in "${runs[@]}"; do
    eval "words=($run)"
    status=0
    if $is_dry_run; then
      printf '%q ' "$root/scripts/train.sh" "$config" "${words[@]}" && echo
      continue
    elif $is_stopped; then
      status=75
      summary+=("${words[0]#name=}: not started")
    else
      train "$config" "${words[@]}" || status=$?
      case $status in
        0) summary+=("${words[0]#name=}: complete") ;;
        75) summary+=("${words[0]#name=}: saved before its end") ;;
        *) summary+=("${words[0]#name=}: failed with status $status") ;;
      esac
    fi
    case $status in
      0) ;;
      75) worst=$((worst == 0 ? 75 : worst)) ;;
      *) worst=1 ;;
    esac
  done
  if ((${#summary[@]})); then printf 'sweep.sh: %s\n' "${summary[@]}" >&2; fi
  exit "$worst"
}

if $is_slurm; then submit; else train_all; fi
