"""Every evidence report of one tuning run, with one command."""

import _repository  # noqa: F401

from eg3d_rlhf.evaluation.reports import main

if __name__ == "__main__":
    main()
