"""python -m eg3d_rlhf, or the folder as a script, in a checkout that is not installed: the same as the
console script eg3d-rlhf.
"""

import sys
from pathlib import Path

if not __package__:  # run as a folder, which then stands first where modules are looked for
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eg3d_rlhf.modes.jobs import PROGRAM, main  # noqa: E402

if __name__ == "__main__":
    main(prog_name=PROGRAM)
