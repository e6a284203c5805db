"""Evaluate the effect of tuning. The same as eg3d-rlhf report evaluate."""

import _repository  # noqa: F401

from eg3d_rlhf.modes.reports import evaluate as main

if __name__ == "__main__":
    main()
