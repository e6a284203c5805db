"""Evaluate the effect of tuning on a generator. Same command: eg3d-rlhf report evaluate."""

import _repository  # noqa: F401

from eg3d_rlhf.modes.reports import evaluate as main

if __name__ == "__main__":
    main()
