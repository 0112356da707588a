# llm2vec-service in a container.
#
#   docker build -t llm2vec-service .
#   docker run --gpus 1 -p 8000:8000 -v models:/models llm2vec-service
#
# docs/deployment.md says which build arguments a GPU and its driver need. pip prefers a wheel of torch in docker/wheels/ to
# the index's, so that a build need not fetch it.
#
# With `--target server-flash` the image also has the flash-attn kernels, which are compiled first: that takes hours.

ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS base
# torch.compile and Triton compile C and C++ with Python.h while the server starts. Official Python images bring the
# header, Debian's own Python has it in a package of its own.
RUN header="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
    && apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && { test -f "$header" || apt-get install --yes --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/* \
    && { test -f "$header" || { echo "BASE_IMAGE lacks $header, which torch.compile needs: choose a base with it" >&2; exit 1; }; }

FROM base AS builder
# What the image is for: cuda, or cpu. The build fails if pip has chosen a torch that can't do it.
ARG DEVICE=cuda
# Another index to take torch from than PyPI, and another version than that of constraints.txt.
ARG TORCH_INDEX=
ARG TORCH_VERSION=
# Extras of pyproject.toml, with commas between. Without demo the image is smaller and can't make the demo encoder.
ARG EXTRAS=demo
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/src/docker/wheels
# The base's pip installs into the environment from outside, so that the environment itself holds none.
RUN python3 -m venv --without-pip /opt/venv
WORKDIR /src
COPY constraints.txt ./
# Each torch bounds setuptools in its own way.
RUN if [ -n "$TORCH_VERSION" ]; then sed -i "s/^torch==.*/torch==$TORCH_VERSION/; /^setuptools==/d" constraints.txt; fi
COPY docker/check_torch.py docker/
COPY docker/wheels docker/wheels
# torch first: its exact version decides what the rest resolves against. Alone from its index, so that pip can't take PyPI's
# where the index lacks that version.
RUN --mount=type=cache,target=/root/.cache/pip \
    install="python3 -m pip --python /opt/venv/bin/python3 install --constraint constraints.txt" \
    && if [ -n "$TORCH_INDEX" ]; then $install --no-deps --index-url "$TORCH_INDEX" torch; fi \
    && $install torch \
    && /opt/venv/bin/python3 -W ignore docker/check_torch.py "$DEVICE"
COPY pyproject.toml README.md LICENSE ./
COPY model_store model_store
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/venv/bin/python3 install --constraint constraints.txt ".[${EXTRAS}]"

# All of the image but the packages.
FROM base AS runtime
# The number is fixed because the files in the volume belong to it. Whatever writes to its home, writes to the volume.
RUN groupadd --gid 10001 llm2vec \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /models --shell /usr/sbin/nologin llm2vec \
    && install --directory --owner=10001 --group=10001 /models
# NVIDIA_: for hosts whose default runtime is NVIDIA's, which goes by these where no option names a GPU.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/models \
    HF_HOME=/models/hub \
    TORCHINDUCTOR_CACHE_DIR=/models/inductor \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LLM2VEC_HOST=0.0.0.0 \
    LLM2VEC_MODELS_DIR=/models
VOLUME /models
WORKDIR /models
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
EXPOSE 8000
# Healthy once the model answers. At the first start it may have to be downloaded and built; and where the last batch
# failed, the answer may take 30 seconds.
HEALTHCHECK --interval=10s --timeout=35s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ.get(\"LLM2VEC_PORT\") or 8000}/health')"]
ENTRYPOINT ["llm2vec-service"]
CMD ["serve"]

# On the builder, so that the wheel has the glibc, the Python and the torch of the image that it goes into.
FROM builder AS flash-wheel
# GPUs by compute capability. Fewer of them, such as 90 alone for Hopper, take less time.
ARG FLASH_ATTN_CUDA_ARCHS="80;90;100;120"
# Fewer jobs if the compiler is killed: each takes several GB of memory.
ARG MAX_JOBS=4
# torch requires one release of the CUDA toolkit, and so pip takes nvcc of that release. The folder lacks lib64 and a
# name to link libcudart by. NVIDIA's packages of CUDA 12 hold no nvcc.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/venv/bin/python3 install --constraint constraints.txt \
        torch "cuda-toolkit[cccl,crt,nvcc,nvvm]" ninja packaging psutil setuptools wheel \
    && ln -s /opt/venv/lib/python3*/site-packages/nvidia/cu13 /opt/cuda \
    && { test -x /opt/cuda/bin/nvcc || { echo "server-flash needs a torch for CUDA 13: leave TORCH_INDEX out" >&2; exit 1; }; } \
    && ln -s lib /opt/cuda/lib64 \
    && ln -s libcudart.so.13 /opt/cuda/lib/libcudart.so
# Its build imports torch and asks for none of these itself, hence no isolation.
RUN --mount=type=cache,target=/root/.cache/pip \
    CUDA_HOME=/opt/cuda PATH=$PATH:/opt/cuda/bin:/opt/venv/bin \
    python3 -m pip --python /opt/venv/bin/python3 wheel --no-deps --no-build-isolation --wheel-dir /wheels "flash-attn>=2.7"

FROM builder AS builder-flash
COPY --from=flash-wheel /wheels /wheels
# Only the wheel made above will do: compiling needs nvcc, which is not here.
RUN python3 -m pip --python /opt/venv/bin/python3 install --constraint constraints.txt \
    --find-links /wheels --only-binary flash-attn ".[flash]"

FROM runtime AS server-flash
COPY --from=builder-flash /opt/venv /opt/venv

# Last, so that it is what is built when no target is named. Engines leave out the stages that it does not need.
FROM runtime AS server
COPY --from=builder /opt/venv /opt/venv
