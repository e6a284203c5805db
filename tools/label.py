"""Label pairs of shapes in the browser: plans or resumes a campaign, prepares its shapes, serves the page and prints the address.

\b
Example:
    python tools/label.py --network=runs/00001-x --pairs=1000
"""

import sys

import _repository  # noqa: F401

from eg3d_rlhf.people.label.access import is_quick, quick

if __name__ == "__main__":
    if is_quick(sys.argv[1:]):
        quick(prog_name="label.py")
    else:
        from eg3d_rlhf.people.label.commands import main

        main()
