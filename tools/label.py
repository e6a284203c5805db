"""Label pairs of shapes in the browser. The command plans or resumes a labelling project, prepares its
shapes, and serves the page. Same command: eg3d-rlhf label.

\b
Example:
    python tools/label.py --network=runs/00001-x --pairs=1000
"""

import _repository  # noqa: F401

from eg3d_rlhf.modes.label import main

if __name__ == "__main__":
    main()
