"""The demo with several training seeds, and their summaries side by side."""

import _repository  # noqa: F401

from eg3d_rlhf.evaluation.over_seeds import main

if __name__ == "__main__":
    main()
