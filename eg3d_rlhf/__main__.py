"""Run the console script eg3d-rlhf as `python -m eg3d_rlhf`, or from the folder `eg3d_rlhf` as a script.

Both work in a checkout that is not installed.
"""

import sys
from pathlib import Path

# Run as a folder, Python puts that folder first on the import path; the packages lie in the folder above it.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eg3d_rlhf.modes.jobs import PROGRAM, main  # noqa: E402

if __name__ == "__main__":
    main(prog_name=PROGRAM)
