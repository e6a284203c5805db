"""Label pairs of shapes in the browser: plans or resumes a campaign, prepares its shapes, serves the page and prints the address.

\b
Example:
    python tools/label.py --network=runs/00001-x --pairs=1000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eg3d_rlhf.label.commands import main  # noqa: E402

if __name__ == "__main__":
    main()
