"""Run the command eg3d-rlhf with `python -m eg3d_rlhf` or with `python PATH/eg3d_rlhf`.

Both forms work in a checkout of the repository that is not installed.
"""

import sys
from pathlib import Path

# `python PATH/eg3d_rlhf` puts the folder eg3d_rlhf first on the import path. `import eg3d_rlhf` and
# `import training` need the folder that contains it, so the entry is replaced by the parent folder.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eg3d_rlhf.modes.jobs import PROGRAM, main  # noqa: E402

if __name__ == "__main__":
    main(prog_name=PROGRAM)
