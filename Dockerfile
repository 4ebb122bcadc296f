# syntax=docker/dockerfile:1
# Two images from one file, without weights:
#   docker build -t dspark-serve:gpu .                 NVIDIA GPUs, amd64 and arm64 (DGX Spark): the default
#   docker build -t dspark-serve:cpu --target cpu .    the C++ kernels, amd64 and arm64
# Models and measured step times live in the volume /cache (DSPARK_CACHE).

# ---- what both images run: one user, one cache, one health check
FROM debian:13-slim AS cpu-base
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv ca-certificates \
    && rm -rf /var/lib/apt/lists/*

# torch's CUDA 13 wheels bring cuBLAS and all the rest; of the image only the driver's hooks are needed, hence "base".
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS gpu-base
# Triton builds a small launcher in C when a kernel is first used: a compiler and Python's headers stay in the image.
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev ca-certificates \
    && rm -rf /var/lib/apt/lists/*

# ---- build stages: dependencies first, so that a change of ours does not fetch torch again
FROM cpu-base AS cpu-build
RUN apt-get update && apt-get install -y --no-install-recommends python3-dev g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dspark && /opt/dspark/bin/pip install --no-cache-dir "setuptools>=77" wheel
WORKDIR /src
COPY constraints.txt ./
# constraints.txt pins the release whose CPU wheel is small; the index has no other kind. Empty: the index pip is set up with.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/dspark/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml setup.py MANIFEST.in README.md ./
COPY dspark_serve ./dspark_serve
COPY kernels ./kernels
RUN /opt/dspark/bin/pip install --no-cache-dir -c constraints.txt ".[otel]"

FROM gpu-base AS gpu-build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dspark && /opt/dspark/bin/pip install --no-cache-dir "setuptools>=77" wheel
WORKDIR /src
COPY constraints.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
RUN /opt/dspark/bin/pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml setup.py MANIFEST.in README.md ./
COPY dspark_serve ./dspark_serve
COPY kernels ./kernels
RUN /opt/dspark/bin/pip install --no-cache-dir -c constraints.txt ".[gpu,otel]"

# ---- the images
FROM cpu-base AS cpu
COPY --from=cpu-build /opt/dspark /opt/dspark
COPY configs /etc/dspark-serve
RUN useradd --uid 10001 --create-home dspark && install -d -o dspark -g dspark /cache
ENV PATH=/opt/dspark/bin:$PATH DSPARK_CACHE=/cache HF_HOME=/cache/huggingface DSPARK_HOST=0.0.0.0 DSPARK_PORT=8000
USER dspark
WORKDIR /home/dspark
VOLUME /cache
EXPOSE 8000
# /health answers while the model loads, and 503 once the engine has failed; /ready is for routers.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"DSPARK_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["dspark-serve"]
CMD ["serve"]

# Last, so that it is what `docker build .` makes.
FROM gpu-base AS gpu
COPY --from=gpu-build /opt/dspark /opt/dspark
COPY configs /etc/dspark-serve
RUN useradd --uid 10001 --create-home dspark && install -d -o dspark -g dspark /cache
ENV PATH=/opt/dspark/bin:$PATH DSPARK_CACHE=/cache HF_HOME=/cache/huggingface DSPARK_HOST=0.0.0.0 DSPARK_PORT=8000
# A container without a GPU must not serve from the CPU by mistake: then the server says so and ends.
ENV DSPARK_DEVICE=cuda TRITON_CACHE_DIR=/cache/triton
USER dspark
WORKDIR /home/dspark
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"DSPARK_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["dspark-serve"]
CMD ["serve"]
