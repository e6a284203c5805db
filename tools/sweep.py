"""A grid of lambda_r and lambda_sigma: reward against distance and geometry."""

import _repository  # noqa: F401

from eg3d_rlhf.evaluation.sweep import main

if __name__ == "__main__":
    main()
