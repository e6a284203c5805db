"""Render samples of a generator, like EG3D's gen_samples.py. Same command: eg3d-rlhf samples images."""

import _repository  # noqa: F401

from eg3d_rlhf.modes.samples import images as main

if __name__ == "__main__":
    main()
