# An image that trains:  docker build -t megatron_ee .
#
# The base image brings Python, CUDA and its own torch, which stays: the environment below sees it, and its exact
# version takes the place of torch's pin. Everything else has the versions of constraints.txt. Another base (Python 3.11
# and torch 2.8 at least, Transformer Engine if you want it): docker build --build-arg BASE=... -t megatron_ee .

ARG BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime
FROM ${BASE}

WORKDIR /opt/megatron_ee

# What is installed changes less often than the code does: this layer is kept as long as these files stay the same.
# The package is only a stub here (its version is read from it); the code that follows takes its place.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY megatron_ee/__init__.py megatron_ee/
RUN python3 -m venv --system-site-packages .venv \
    && .venv/bin/python -c 'import torch; print(f"torch=={torch.__version__}")' > /tmp/constraints.txt \
    && grep -v '^torch==' constraints.txt >> /tmp/constraints.txt \
    && .venv/bin/python -m pip install --no-cache-dir --editable '.[plots]' --constraint /tmp/constraints.txt \
    && rm /tmp/constraints.txt

COPY . .

# Runs are written here; mount a folder over it to keep them.
RUN useradd --create-home megatron_ee && mkdir -p runs && chown megatron_ee runs
USER megatron_ee

ENTRYPOINT ["scripts/train.sh"]
CMD ["--help"]
