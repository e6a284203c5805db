"""Scores of generators by a reward that knows one of them."""

import _repository  # noqa: F401

from eg3d_rlhf.evaluation.foreign_scores import main

if __name__ == "__main__":
    main()
