"""Files of any flow generator: `conditions` embeds pictures, `draw` draws assets to rank, `ranking` makes pairs, `export` its layout.

\b
Example:
    python tools/flow_files.py draw --pipeline=ROOT --out=ASSETS
"""

import _repository  # noqa: F401

from eg3d_rlhf.modes.flow_files import main

if __name__ == "__main__":
    main()
