#!/usr/bin/env bash
# Build the wheel, and train and decode with it in clean environments:  scripts/check_wheel.sh [EXTRA ...]
#
# There is one environment without extras, and one with each extra of pyproject.toml (or with each EXTRA) where what the
# extra is for is tried too. They have the versions of constraints.txt, and lie, like the runs, in a temporary folder
# that is removed in the end. On plain settings pip downloads torch and all the rest: see "Install" in the README.
#
#   PYTHON  the interpreter that makes the environments (python3)

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}

case ${1-} in
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VIRTUAL_ENV
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export WANDB_CACHE_DIR=$work/wandb WANDB_CONFIG_DIR=$work/wandb WANDB_DATA_DIR=$work/wandb

step() { printf '\n-- %s\n' "$1"; }

fail() {
  echo "check_wheel.sh: $1" >&2
  exit 1
}

install() { "$1/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" "${@:2}"; }

# From a copy: setuptools also packs what an earlier build has left in the checkout.
build_wheel() {
  mkdir source
  cp -R "$root"/{pyproject.toml,README.md,LICENSE,megatron_ee} source
  "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir . ./source
  rm -r source
}

# One environment with torch (first and alone: see the Makefile) and the wheel, which is copied for each extra.
build_environment() {
  "$PYTHON" -m venv clean
  install clean "$(grep '^torch==' "$root/constraints.txt")"
  install clean "$wheel"
}

add_extra() {
  cp -a clean "$1"  # with times, or all would be compiled again
  install "$1" "${wheel}[$1]"
  "$1/bin/python" -m pip check
}

write_config() {
  cat >tiny.yaml <<'EOF'
name: tiny
device: cpu
model: {num_layers: 2, hidden_size: 32, num_attention_heads: 2}
exits: {layers: [1], weight_schedule: {warmup_iters: 1}}
data: {sequence_length: 32}
training: {train_iters: 2, global_batch_size: 2, micro_batch_size: 1, eval_iters: 1}
logging: {interval: 1}
EOF
}

# Train a run named NAME with ENVIRONMENT, and decode with it: train_and_decode ENVIRONMENT NAME [key.path=value ...]
train_and_decode() {
  local python=$1/bin/python run=runs/$2
  "$python" -m megatron_ee.training tiny.yaml name="$2" "${@:3}"
  "$python" -m megatron_ee.inference --checkpoint "$run" --prompt "def " inference.sampling.max_new_tokens=8
  [[ -s $run/metrics.jsonl ]] || fail "$2: $run has no figures"
}

try_extra() {
  case $1 in
    deepspeed) deepspeed/bin/python -c 'import deepspeed' ;;
    hf)
      hf/bin/python -c '
import pathlib, megatron_ee.tokenizer as tokenizer
pathlib.Path("bpe.json").write_bytes(tokenizer.train_bpe(["def f(x): return x\n"] * 9, 300))'
      train_and_decode hf bpe data.tokenizer=bpe.json
      ;;
    plots)
      plots/bin/python "$root/tools/plot_losses.py" runs/plots
      [[ -s runs/plots/pictures/losses.png ]] || fail "plots: no picture"
      ;;
    serve) serve/bin/python -c 'import fastapi, prometheus_client, uvicorn' ;;
    tensorboard)
      train_and_decode tensorboard events logging.tensorboard=true
      compgen -G 'runs/events/tensorboard/events*' || fail "tensorboard: no event file"
      ;;
    wandb)
      train_and_decode wandb offline 'logging.wandb={project: wheel, mode: offline}'
      compgen -G 'runs/offline/wandb/offline-run-*/*.wandb' || fail "wandb: no offline run"
      ;;
    *) fail "$1: this extra has no check here" ;;
  esac
}

cd "$work"
read -ra extras < <("$PYTHON" -c '
import sys, tomllib
extras = tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]
print(*sorted(extras.keys() - {"dev"}))' "$root/pyproject.toml")
if (($#)); then extras=("$@"); fi

step "the wheel"
build_wheel
wheel=$(echo "$work"/*.whl)
echo "${wheel##*/}"

step "without extras"
build_environment
[[ $(clean/bin/python -c 'import megatron_ee; print(megatron_ee.__file__)') == "$work"/clean/* ]] \
  || fail "the package is not the wheel's"
write_config
train_and_decode clean clean

for extra in "${extras[@]}"; do
  step "with [$extra]"
  SECONDS=0
  add_extra "$extra"
  train_and_decode "$extra" "$extra"
  try_extra "$extra"
  rm -r "${extra:?}"
  echo "[$extra] is fine ($SECONDS s)"
done

step "the wheel works: without extras, and with each of: ${extras[*]}"
