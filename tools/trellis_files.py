"""TRELLIS's files: `conditions` embeds, `draw` draws assets to rank, `ranking` and `dso` make pairs, `export` writes the stock layout.

\b
Example:
    python tools/trellis_files.py export --pipeline=TRELLIS-text-large --structure=runs/00000-x/structure --out=tuned
"""

import _repository  # noqa: F401

from eg3d_rlhf.modes.trellis_files import main

if __name__ == "__main__":
    main()
