"""Make the packages of this repository importable for the scripts in this folder.

Each script imports this module first, since torch_utils must be imported before torch: it sets how OpenMP
threads wait.
"""

import sys
from pathlib import Path

# The scripts may be started from any folder, without an installation.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_utils  # noqa: E402, F401
