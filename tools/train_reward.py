"""Train a reward on labels of a generator's shapes. Same command: eg3d-rlhf reward train."""

import _repository  # noqa: F401

from eg3d_rlhf.modes.reward_training import train as main

if __name__ == "__main__":
    main()
