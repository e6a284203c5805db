"""Make the packages of this repository importable for the scripts in this folder.

It also imports torch_utils before torch, which sets how OpenMP threads wait.
"""

import sys
from pathlib import Path

# The scripts may be started from any folder, without an installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_utils  # noqa: E402, F401
