"""Convert a set of images, like EG3D's dataset_tool.py. Same command: eg3d-rlhf data convert."""

import _repository  # noqa: F401

from eg3d_rlhf.modes.image_sets import convert as main

if __name__ == "__main__":
    main()
