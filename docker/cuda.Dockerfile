# pyunictokens on an NVIDIA GPU: real weights, the paper's reward models, serving. The machine needs NVIDIA's container
# toolkit and a driver for CUDA 13; CUDA itself comes with torch, and nvcc is needed in the first stage alone.
#
#   docker build -f docker/cuda.Dockerfile -t pyunictokens:cuda .
#   mkdir -p work      # Docker would make it as root; whoever runs in the image has the id 1000 and writes there
#   docker run --rm --gpus all -v "$PWD/work:/data" pyunictokens:cuda \
#     train mydata mug --model show-o-512 --out runs/mug
#
# What the hub sends is kept in /data/hub, so that it is fetched once.
FROM nvidia/cuda:13.0.0-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /build
WORKDIR /src
COPY pyproject.toml setup.py CMakeLists.txt MANIFEST.in constraints.txt README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY pyunictokens pyunictokens
RUN PYUNICTOKENS_CUDA=on /build/bin/pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim-trixie
# Triton compiles what starts its kernels with a C compiler when they first run
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /wheels/
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[cli,rewards,web]" \
    && useradd --create-home --uid 1000 user
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV HF_HOME=/data/hub
USER user
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["pyunictokens"]
CMD ["--help"]
