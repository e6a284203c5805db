"""Compare two generators in a blind study: design it, serve it in the browser, and report on it when it is
over. Same command: eg3d-rlhf study.

\b
Example:
    python tools/study.py --a=before --b=after --n=300 --annotators=6
"""

import _repository  # noqa: F401

from eg3d_rlhf.modes.study import main

if __name__ == "__main__":
    main()
