"""Benchmark of the project against the direct implementation of EG3D: `python -m benchmarks --help`."""

import torch_utils  # noqa: F401 (imported before torch, since it sets how OpenMP threads wait)
