"""Compute FID and KID of a generator, like EG3D's script of this name. The same as eg3d-rlhf data metrics."""

import _repository  # noqa: F401

from eg3d_rlhf.modes.image_sets import metrics as main

if __name__ == "__main__":
    main()
