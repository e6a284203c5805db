# Demo and tests on a CPU. For CUDA take a base such as nvidia/cuda:13.0.1-devel-ubuntu24.04 with Python 3.11 or later and leave out
# --index-url: PyTorch's CUDA build is then installed. Neither has been run on a GPU.
#
#     docker build -t eg3d-rlhf .
#     docker run --rm eg3d-rlhf make demo
#     docker run --rm eg3d-rlhf make test
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends build-essential chromium git make && rm -rf /var/lib/apt/lists/*
WORKDIR /eg3d-rlhf
COPY . .
RUN python -m venv .venv && .venv/bin/pip install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    && .venv/bin/pip install -q -c constraints.txt -e '.[dev]' && touch .venv/.plain .venv/.installed
CMD ["make", "demo"]
