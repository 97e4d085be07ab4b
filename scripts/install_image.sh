#!/usr/bin/env bash
# Install what the image needs into .venv of the current folder, around the torch that is there:
#   scripts/install_image.sh EXTRA[,EXTRA ...]
#
# The environment sees the interpreter's own packages. torch's exact version takes the place of torch's pin, so that it
# stays; everything else has the versions of constraints.txt.

set -euo pipefail

case ${1-} in
  -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
  '') echo "install_image.sh: which extras?" >&2 && exit 2 ;;
esac

# NVIDIA's images hold every package to the version of their own through this variable.
unset PIP_CONSTRAINT

# Without a pip of its own, which Debian and Ubuntu may lack the files for: the interpreter's serves.
python3 -m venv --system-site-packages --without-pip .venv
constraints=$(mktemp)
trap 'rm "$constraints"' EXIT
.venv/bin/python -c 'import torch; print(f"torch=={torch.__version__}")' >"$constraints"
grep -v '^torch==' constraints.txt >>"$constraints"
.venv/bin/python -m pip install --no-cache-dir --editable ".[$1]" --constraint "$constraints"
