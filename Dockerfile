# Images that train, or serve (docker run --entrypoint scripts/serve.sh):
#
#   docker build -t megatron_ee .                      for NVIDIA GPUs
#   docker build --target cpu -t megatron_ee:cpu .     for CPUs, small
#
# The first is built on NVIDIA's PyTorch, which brings Python, CUDA, Apex, Transformer Engine and its own torch; that
# torch stays, and everything else has the versions of constraints.txt. Another base (Python 3.11 and torch 2.8 at
# least, Apex and Transformer Engine if you want them): docker build --build-arg BASE=... -t megatron_ee .

ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3

# What is installed changes less often than the code does: that layer is kept as long as these files stay the same.
# The package is only a stub here (its version is read from it); the code that follows takes its place.
FROM scratch AS requirements
COPY pyproject.toml constraints.txt README.md LICENSE /
COPY megatron_ee/__init__.py /megatron_ee/
COPY scripts/install_image.sh /scripts/

FROM scratch AS code
COPY . /

FROM python:3.11-slim-bookworm AS cpu
WORKDIR /opt/megatron_ee
COPY --from=requirements / ./
# A version with "+cpu" goes before the same one without, so the small build is taken.
RUN torch=$(grep '^torch==' constraints.txt) \
    && python3 -m pip install --no-cache-dir "$torch" --constraint constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu \
    && scripts/install_image.sh plots,serve
COPY --from=code / ./
# Runs are written here; mount a folder over it to keep them.
RUN useradd --uid 1001 --create-home megatron_ee && mkdir -p runs && chown megatron_ee runs
USER 1001
ENTRYPOINT ["scripts/entrypoint.sh"]
CMD ["--help"]

# The last one is what is built without --target.
FROM ${BASE} AS cuda
WORKDIR /opt/megatron_ee
COPY --from=requirements / ./
RUN scripts/install_image.sh plots,deepspeed,serve
COPY --from=code / ./
RUN useradd --uid 1001 --create-home megatron_ee && mkdir -p runs && chown megatron_ee runs
USER 1001
ENTRYPOINT ["scripts/entrypoint.sh"]
CMD ["--help"]
