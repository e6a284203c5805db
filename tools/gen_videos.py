"""Render videos of a generator, like EG3D's gen_videos.py. Same command: eg3d-rlhf samples videos."""

import _repository  # noqa: F401

from eg3d_rlhf.modes.samples import videos as main

if __name__ == "__main__":
    main()
