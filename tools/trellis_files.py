"""TRELLIS's files: `conditions` embeds, `draw` draws assets to rank, `ranking` and `dso` make pairs, `export` writes the stock layout.

\b
Example:
    python tools/trellis_files.py export --pipeline=TRELLIS-text-large --structure=runs/00000-x/structure --out=tuned
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eg3d_rlhf.flow.trellis.commands import main  # noqa: E402

if __name__ == "__main__":
    main()
