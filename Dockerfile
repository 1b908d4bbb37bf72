# Two images of one project:
#
#   docker build --target server --tag fedmermed-server .   # the coordinator's: no torch, no CUDA
#   docker build --target site   --tag fedmermed-site .     # a hospital's: torch with its GPU libraries
#
# BASE            any image with Python 3.11 to 3.13, pip and Debian's useradd
# TORCH_BACKEND   `cpu` for a machine without a GPU: uv then takes torch's own builds without CUDA

ARG BASE=python:3.11-slim

# What both are built with; lent to their steps below, and in neither image.
FROM ${BASE} AS tools
COPY constraints.txt /tmp/
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt --target /opt/uv uv

# A user of its own, whose number a host's files can be given to; directories for the volumes.
FROM ${BASE} AS runtime
RUN groupadd --gid 10001 fedmermed \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin fedmermed \
    && install --directory --owner 10001 --group 10001 --mode 0700 \
    /study /runs /site /site/data /site/state /link
ENV PATH=/opt/fedmermed/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FLWR_HOME=/tmp/flower \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    OMP_WAIT_POLICY=PASSIVE \
    VIRTUAL_ENV=/opt/fedmermed
LABEL org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /tmp

# Dependencies first: they change less often than our code.
FROM runtime AS server
RUN --mount=type=bind,from=tools,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    python -m venv --without-pip /opt/fedmermed \
    && /opt/uv/bin/uv pip install --no-cache --compile-bytecode --constraint /build/constraints.txt \
    --requirement /build/pyproject.toml
RUN --mount=type=bind,from=tools,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=.,target=/build,rw \
    /opt/uv/bin/uv pip install --no-cache --compile-bytecode --no-deps /build
USER 10001:10001
LABEL org.opencontainers.image.title="fedmermed-server" \
    org.opencontainers.image.description="FedMerMED's coordinator"
CMD ["fedmermed-server", "--help"]

FROM runtime AS site
ARG TORCH_BACKEND=
RUN --mount=type=bind,from=tools,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=constraints.txt,target=/build/constraints.txt \
    --mount=type=bind,source=pyproject.toml,target=/build/pyproject.toml \
    python -m venv --without-pip /opt/fedmermed \
    && /opt/uv/bin/uv pip install --no-cache --compile-bytecode --constraint /build/constraints.txt \
    --requirement /build/pyproject.toml --extra site --extra volumes --extra slides \
    ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"}
RUN --mount=type=bind,from=tools,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=.,target=/build,rw \
    /opt/uv/bin/uv pip install --no-cache --compile-bytecode --no-deps /build
USER 10001:10001
LABEL org.opencontainers.image.title="fedmermed-site" \
    org.opencontainers.image.description="FedMerMED's hospital side"
CMD ["fedmermed-site", "--help"]
