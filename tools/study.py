"""Compare two generators blind: designs the study, serves it in the browser, and reports on it when its
stopping rule is met.

\b
Example:
    python tools/study.py --a=before --b=after --n=300 --annotators=6
"""

import _repository  # noqa: F401

from eg3d_rlhf.modes.study import main

if __name__ == "__main__":
    main()
