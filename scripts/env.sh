# shellcheck shell=bash
# What training wants in the environment of its ranks; scripts/train.sh sources it:  source env.sh [TENSOR]
#
# TENSOR is parallel.tensor. What is set already stays as it is, and on a machine without GPUs what is for them is read
# by nobody. Only what differs from the default of current versions is here; what a cluster's network needs (NCCL_*,
# GLOO_*) is the cluster's to set.

# The ranks of a node share its cores, and torch would give every one of them all of them.
export OMP_NUM_THREADS="${OMP_NUM_THREADS-1}"

# A rank that dies of a signal (a bad kernel, NCCL's watchdog) says where each of its threads was.
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER-1}"

# Exits, fills and chunks of logits ask for blocks of many sizes, which leave holes between fixed segments. The second
# name is the older one of the same setting.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF-${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}}"

# With one hardware queue kernels start in the order in which they are launched: megatron-core's tensor parallelism
# counts on it to start a sum before the product that is to hide it. Without tensor parallelism several queues are
# better: a message between stages waits for nothing that is launched before it on another stream.
if ((${1:-1} > 1)); then
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS-1}"
fi
