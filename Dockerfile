# Loraplane in a container. Two targets, one recipe:
#
#   docker build --target cpu  -t loraplane:cpu  .
#   docker build --target cuda -t loraplane:cuda .
#
# Which build of torch goes in is the package index's choice: give your own with --build-arg PIP_INDEX_URL=... and
# --build-arg PIP_EXTRA_INDEX_URL=... (an index of CPU builds makes the cpu image several gigabytes smaller). Keep
# passwords out of these arguments: they stay in the image's history.
#
#   docker run --rm -v loraplane:/var/lib/loraplane -e HF_HUB_OFFLINE=0 loraplane:cpu models pull
#   docker run -p 8000:8000 --shm-size 1g -v loraplane:/var/lib/loraplane -e LORAPLANE_API_KEYS=lp_... loraplane:cpu
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/loraplane
ENV PATH=/opt/loraplane/bin:$PATH
RUN pip install pip==26.3
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY adapters adapters
COPY serving serving
COPY train train
RUN pip install -c constraints.txt '.[serve,train,eval,postgres]'
# The CPU kernels, compiled here since no compiler is where they run; a CPU without their instructions leaves them alone.
RUN if [ "$(uname -m)" = x86_64 ]; then \
      apt-get update && apt-get install -y --no-install-recommends g++ && cd / && python -m serving.engine.kernels.load; \
    fi

FROM ${PYTHON_IMAGE} AS runtime
# A number, not a name: Kubernetes' runAsNonRoot can check it.
RUN useradd --uid 10001 --create-home loraplane && install -d -o 10001 -g 10001 /var/lib/loraplane
COPY --from=build /opt/loraplane /opt/loraplane
ENV PATH=/opt/loraplane/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORAPLANE_HOME=/var/lib/loraplane \
    HF_HUB_OFFLINE=1 \
    HF_DATASETS_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 10001
WORKDIR /var/lib/loraplane
VOLUME /var/lib/loraplane
EXPOSE 8000
# Live means that the loop answers; the start (Ray, the base) may take a while on a small machine.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# `serve` refuses this bind without LORAPLANE_API_KEYS.
ENTRYPOINT ["loraplane"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS cuda
# Triton starts its kernels through a stub that it compiles on the spot; without a compiler adapters run on torch alone.
USER root
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN python -c "import sys, torch; sys.exit(None if torch.version.cuda else 'this index gave a CPU build of torch')"

# The last stage is what a build without --target makes.
FROM runtime AS cpu
RUN python -c "import torch; print('torch', torch.__version__)"
