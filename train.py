"""Train a tri-plane GAN, with or without a reward on its density field; a multi-stage flow; or text to 3D.

    python train.py                                  continue the adversarial training of the bundled
                                                     generator, without a reward
    python train.py --reward=sigma --lambda-r=10     fine-tune the bundled generator of synthetic heads with
                                                     a reward: the main job
    python train.py --reward=sigma --rounds=3        the same in rounds of labels, reward training and tuning
    python train.py --init=scratch --kimg=20         train a new generator from random weights
    python train.py --mode=circular-dpo              tune a multi-stage flow with preferences
    python train.py --mode=online                    tune one stage of a flow online with rewards
    python train.py --mode=distill                   text to 3D by score distillation

The last three modes have their own flags.

The modes are in eg3d_rlhf/modes.
"""

from eg3d_rlhf.modes import ModeCommand

main = ModeCommand("train.py")

if __name__ == "__main__":
    main()
