#!/usr/bin/env bash
# What the container starts:  scripts/entrypoint.sh CONFIG [key.path=value ...]
#
# It says on stderr what is installed. Everything else is scripts/train.sh, which gets all arguments and the same
# environment variables.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ -z ${PYTHON-} && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi

# A report that fails must not keep a run from starting: what training needs, it asks for itself.
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m megatron_ee.environment >&2 \
  || echo "entrypoint.sh: no report; see above" >&2

exec "$root/scripts/train.sh" "$@"
