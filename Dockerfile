# llm2vec-service in a container.
#
#   docker build -t llm2vec-service .
#   docker run --gpus 1 -p 8000:8000 -v models:/models llm2vec-service
#
# On Linux pip takes the build of torch with CUDA. For another one, such as the much smaller CPU build, put its wheel
# into docker/wheels/ before building; and take it out again before building for a GPU.
#
# With `--target server-flash` the image also has the flash-attn kernels, which are compiled first: that takes hours.

ARG BASE_IMAGE=python:3.12-slim
# For server-flash only. It needs nvcc of the CUDA release that torch is built with, and the Python of BASE_IMAGE.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04

FROM ${BASE_IMAGE} AS builder
# Extras of pyproject.toml, with commas between. Without demo the image is smaller and can't make the demo encoder.
ARG EXTRAS=demo
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/src/docker/wheels
# The base's pip installs into the environment from outside, so that the environment itself holds none.
RUN python3 -m venv --without-pip /opt/venv
WORKDIR /src
COPY constraints.txt ./
COPY docker/wheels docker/wheels
# torch first: its exact version decides what the rest resolves against.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/venv/bin/python3 install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY model_store model_store
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip --python /opt/venv/bin/python3 install --constraint constraints.txt ".[${EXTRAS}]"

# All of the image but the packages.
FROM ${BASE_IMAGE} AS runtime
# Debian packages to have besides: with g++ the server compiles the model's layers.
ARG SYSTEM_PACKAGES=
RUN if [ -n "$SYSTEM_PACKAGES" ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends $SYSTEM_PACKAGES \
        && rm -rf /var/lib/apt/lists/*; \
    fi
# The number is fixed because the files in the volume belong to it. Whatever writes to its home, writes to the volume.
RUN groupadd --gid 10001 llm2vec \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /models --shell /usr/sbin/nologin llm2vec \
    && install --directory --owner=10001 --group=10001 /models
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/models \
    HF_HOME=/models/hub \
    TORCHINDUCTOR_CACHE_DIR=/models/inductor \
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

FROM ${CUDA_IMAGE} AS flash-wheel
# Fewer jobs if the compiler is killed: each takes several GB of memory.
ARG MAX_JOBS=4
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/src/docker/wheels
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git python3-dev python3-venv \
    && python3 -m venv /opt/build
WORKDIR /src
COPY constraints.txt ./
COPY docker/wheels docker/wheels
# Its build imports torch and asks for none of these itself, hence no isolation.
RUN /opt/build/bin/pip install --constraint constraints.txt torch ninja packaging psutil setuptools wheel \
    && /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels "flash-attn>=2.7"

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
