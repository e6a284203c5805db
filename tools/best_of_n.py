"""How far a reward can be trusted, before any tuning: the best of n latents by it, and what a judge says."""

import _repository  # noqa: F401

from eg3d_rlhf.evaluation.best_of_n import main

if __name__ == "__main__":
    main()
