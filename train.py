"""Train: a tri-plane GAN, or one fine-tuned with a reward on its density field; a flow in stages; text to 3D.

    python train.py                                  fine-tune nothing: the GAN alone, continuing the bundled
                                                     generator
    python train.py --reward=sigma --lambda-r=10     the main job: reward fine-tuning of the bundled generator
                                                     on synthetic heads
    python train.py --reward=sigma --rounds=3        the same in rounds: label, train rewards, tune, and again
    python train.py --init=scratch --kimg=20         train the bundled generator anew
    python train.py --mode=circular-dpo              preference training of a generator in stages; has flags
                                                     of its own
    python train.py --mode=online                    online tuning of one of its stages by rewards; has flags
                                                     of its own
    python train.py --mode=distill                   text to 3D by score distillation; has flags of its own

Hands over to a mode of eg3d_rlhf/modes.
"""

from eg3d_rlhf.modes import ModeCommand

main = ModeCommand("train.py")

if __name__ == "__main__":
    main()
