"""Attribute the change in reward after tuning to regions of the shape.

Same command: eg3d-rlhf report attribute.
"""

import _repository  # noqa: F401

from eg3d_rlhf.modes.reports import attribute as main

if __name__ == "__main__":
    main()
