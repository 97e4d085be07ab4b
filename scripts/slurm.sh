# shellcheck shell=bash
# What scripts/train.slurm and serve.slurm have in common; they source it where they have found `root`, and have `say`,
# `fail` and `job_field`:  source slurm.sh
# shellcheck disable=SC2034,SC2154  # what they pass by its name

# sbatch's options, into `options`, and what follows their `--` into `arguments`:  read_options [argument ...]
read_options() {
  options=()
  if [[ ${1-} == -* && ${1-} != --model* ]]; then
    while (($#)) && [[ $1 != -- ]]; do options+=("$1") && shift; done
    (($#)) || fail "a -- ends sbatch's options, and CONFIG follows"
    shift
  fi
  arguments=("$@")
}

# How each node's SCRIPT is started, into `step`; when one has ended, the others may go on for SECONDS.
#   build_step SCRIPT NODES SECONDS
build_step() {
  local script=$1 nnodes=$2 seconds=$3
  # A step has all CPUs and GPUs of its nodes, but binding would leave a node's one task with one core of them. No node
  # is ended because of another's status: each has its own to tell, and those that hang are ended after a while.
  step=(srun --nodes="$nnodes" --ntasks="$nnodes" --ntasks-per-node=1 --cpu-bind=none --export=ALL)
  step+=(--kill-on-bad-exit=0 --wait="$seconds")
  if [[ -n ${CONTAINER_IMAGE-} ]]; then
    step+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD")
    step+=(--container-mounts="$root:$root,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    step+=(env PYTHON="${PYTHON:-/opt/megatron_ee/.venv/bin/python}")
  fi
  # shellcheck disable=SC2016  # each node has its own
  step+=(bash -c 'NODE_RANK=$SLURM_NODEID NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE-}} exec "$0" "$@"')
  step+=("$root/scripts/$script")
}

check_container() {
  if [[ -n ${CONTAINER_IMAGE-} ]] && ! srun --help | grep -q -e --container-image; then
    fail "CONTAINER_IMAGE: this srun knows no --container-image; install SLURM's pyxis plug-in, or go without"
  fi
}

# By the address that SLURM itself reaches it with: a node's name need not be a host's.
address_of_first_node() {
  local node
  node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  scontrol show node "$node" --oneliner | sed -n 's/^.*\bNodeAddr=\(\S*\).*$/\1/p'
}

# A command as it could be typed.
show() {
  local word line=()
  for word in "$@"; do
    if [[ $word =~ ^[][[:alnum:]_./=:,@%+$'$'-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
  done
  echo "${line[*]}"
}
