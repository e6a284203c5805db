"""Every reward on the bundled heads: trained, tuned by, and compared, in one table."""

import _repository  # noqa: F401

from eg3d_rlhf.evaluation.zoo import main

if __name__ == "__main__":
    main()
