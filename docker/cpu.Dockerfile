# pyunictokens on a CPU: the toy, serving it, and trying everything out.
#
#   docker build -f docker/cpu.Dockerfile -t pyunictokens:cpu .
#   mkdir -p work      # Docker would make it as root; whoever runs in the image has the id 1000 and writes there
#   docker run --rm -v "$PWD/work:/data" pyunictokens:cpu demo --out demo
#   docker run --rm -v "$PWD/work:/data" -p 127.0.0.1:8000:8000 -e PYUNICTOKENS_SERVE_KEY=at-least-16-characters \
#     pyunictokens:cpu serve demo --host 0.0.0.0
#
# With another id of your own: `docker run --user "$(id -u):$(id -g)" -e HOME=/tmp …`.
# PyPI's torch brings libraries for a GPU along; --build-arg PIP_EXTRA_INDEX_URL=… of PyTorch's CPU wheels leaves them out.
FROM python:3.12-slim-trixie AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py CMakeLists.txt MANIFEST.in constraints.txt README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY pyunictokens pyunictokens
RUN PYUNICTOKENS_CUDA=off pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim-trixie
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt /wheels/
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[cli,web]" && useradd --create-home --uid 1000 user
USER user
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["pyunictokens"]
CMD ["--help"]
