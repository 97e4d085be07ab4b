#!/usr/bin/env bash
# Train the demo, hold every exit against a byte bigram, decode with and without exits, and draw the loss curves.
#
# The run is runs/demo. It is never deleted: a run that was stopped goes on where it stopped, and one that is trained
# goes straight to decoding. Exit status 1: an exit did not beat the bigram.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=configs/train/demo.yaml
run=runs/demo
prompts=(--prompt "def " --prompt "import " --prompt "class ")
baseline_name="byte bigram"

if [[ -z ${PYTHON-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; fi
fi
export PYTHON
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# One thread for each process: training runs several, and a token of so small a model is decoded faster by one thread.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step() { printf '\n-- %s\n' "$1"; }

decode() {
  "$PYTHON" -m megatron_ee.inference --checkpoint "$run" "${prompts[@]}" "$@" inference.sampling.max_new_tokens=64
}

step "training $config into $run"
scripts/train.sh "$config"

step "has every exit learned context? validation loss against the best predictor that sees one byte"
statistics=$("$PYTHON" tools/corpus_stats.py "$config")
bigram=$(awk '/^byte-bigram cross-entropy:/ {print $3}' <<<"$statistics")
status=0
"$PYTHON" tools/check_exits.py "$run" --baseline "$bigram" --baseline-name "$baseline_name" || status=$?
if ((status > 1)); then exit "$status"; fi

step "decoding at full depth"
decode inference.exit.mode=full

step "decoding with exits"
decode

step "what exits gain and what they cost, for several thresholds"
decode --compare

step "loss curves"
"$PYTHON" tools/plot_losses.py "$run" --baseline "$bigram" --baseline-name "$baseline_name"

exit "$status"
