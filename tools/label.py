"""Label pairs of shapes in the browser: plan or resume a campaign, prepare its shapes, and serve the page.

\b
Example:
    python tools/label.py --network=runs/00001-x --pairs=1000
"""

import _repository  # noqa: F401

from eg3d_rlhf.modes.label import main

if __name__ == "__main__":
    main()
