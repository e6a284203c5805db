"""Compute FID and KID of a generator, like EG3D's calc_metrics.py. Same command: eg3d-rlhf data metrics."""

import _repository  # noqa: F401

from eg3d_rlhf.modes.image_sets import metrics as main

if __name__ == "__main__":
    main()
