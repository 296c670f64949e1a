# pyunictokens on a CPU: the toy, serving it, and trying everything out.
#
#   docker build -f docker/cpu.Dockerfile -t pyunictokens:cpu .
#   docker run --rm -v "$PWD/work:/data" pyunictokens:cpu demo --out demo
#   docker run --rm -v "$PWD/work:/data" -p 127.0.0.1:8000:8000 -e PYUNICTOKENS_SERVE_KEY=secret pyunictokens:cpu \
#     serve demo --host 0.0.0.0
#
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
RUN pip install --no-cache-dir -c /wheels/constraints.txt "$(ls /wheels/*.whl)[cli,web]" && useradd --create-home user
USER user
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["pyunictokens"]
CMD ["--help"]
