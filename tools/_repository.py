"""Makes the packages of this repository importable by the scripts beside this file; says how threads wait
before torch is loaded.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch_utils  # noqa: E402, F401
