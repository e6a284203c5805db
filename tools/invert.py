"""From one image to a shape, with a reward on geometry."""

import _repository  # noqa: F401

from eg3d_rlhf.evaluation.inversion.command import main

if __name__ == "__main__":
    main()
