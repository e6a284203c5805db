"""Settings of the GAN mode for each configuration of networks (--cfg) and each task.

`HEADS` lists every setting of the run `python train.py --reward=sigma --lambda-r=10`. Other rows of PRESETS
list only the settings that differ from the defaults of the dataclasses (training/config.py,
eg3d_rlhf/tuning/gan/settings.py). eg3d_rlhf/modes/gan.py merges them with the network file and the flags.
"""

from eg3d_rlhf.core import bundled
from eg3d_rlhf.tuning.gan.settings import DEMO_KIMG, REWARDED, SCRATCH, SYNTHETIC, TUNING

# The recipe of the bundled study, `--preset=bundled-study`: length, optimisers and reward phase. It leaves
# the data, the networks and the adversarial losses to --cfg. docs/understand/recipes.md states what is known
# about it for other generators.
BUNDLED_STUDY = {
    # Length and intervals, in thousands of images. The run has 150 iterations.
    "kimg": DEMO_KIMG,  # length of the run
    "batch": 4,  # images per iteration
    "tick": 0.12,  # status line every 120 images
    "snap": 0,  # snapshot at the end only
    "checkpoint_ticks": 1,  # resumable state at every tick
    "start": "G_ema",  # G starts from its moving average
    # Optimisers: one Adam for G, one for D, and a separate one for the reward's gradient on G.
    "glr": 2e-5,  # of G's Adam
    "dlr": 1e-4,  # of D's Adam
    "rlr": 1.2e-3,  # of the reward's Adam on G
    "ema_kimg": 0.1,  # half-life of G_ema, thousands of images
    "ema_rampup": None,  # no ramp
    # The reward: its weight, density consistency with the untuned generator, and the trust region. Adam
    # normalises the scale of the gradient, so only the ratio of the two weights matters. The reward is
    # clipped from above: a defective shape scores below the clip, so its reward has a gradient and the
    # consistency term a small weight. An intact shape scores above the clip, so its reward has no gradient,
    # and the consistency term with its full weight prevents changes.
    "lambda_r": 10.0,  # weight of the reward
    "lambda_sigma": 5.0,  # weight of the density-consistency term
    "lambda_front": 0.0,  # front-growth penalty off
    "lambda_nose": 0.0,  # nose penalty off
    "nose_floor": "window",  # no effect while lambda_nose is 0
    "reward_clip": "-10,q0.55",  # upper bound: the 55 % quantile of untuned scores
    "reward_shaping": "standardised",
    "consistency_gate": 0.01,  # share of lambda_sigma for shapes below the clip
    "consistency_psi": 1.0,  # truncation of its samples
    "consistency_resolution": 32,  # grid points per axis of the consistency term
}
# Settings of `python train.py --reward=sigma --lambda-r=10`, except --reward and its bundled reward files.
HEADS = {
    **BUNDLED_STUDY,
    "batch_gpu": None,  # images per forward pass; None: the whole batch
    "workers": None,  # processes that read images ahead
    # Data and networks: training continues from the bundled generator's moving average. Settings that only
    # new networks use are taken from the file.
    "data": bundled.DATA,  # synthetic heads
    "cond": True,  # camera labels are used
    "mirror": False,  # no mirrored images
    "mbstd_group": 4,  # images per minibatch-std group of D
    "freezed": 0,  # frozen layers of D
    "cbase": 2048,  # channel multiplier
    "cmax": 64,  # largest number of feature maps
    "map_depth": 2,  # layers of the mapping network
    "plane_layout": "fixed",
    "sr_module": None,  # chosen by the resolution
    "sr_noise_mode": "none",  # no noise in super-resolution
    "sr_num_fp16_res": 4,
    "g_num_fp16_res": 0,
    "d_num_fp16_res": 4,
    "c_scale": 1.0,  # scale of the camera label
    "disc_c_noise": 0.0,  # noise on D's camera label, in its standard deviations
    "decoder_lr_mul": 1.0,  # learning-rate multiplier
    # Adversarial training: no fades, no augmentation, no camera conditioning in the mapping network.
    "gamma": 0.3,  # weight of R1
    "aug": "noaug",  # no augmentation of D's inputs
    "p": 0.2,  # for --aug=fixed only
    "target": 0.6,  # of sign(D(real)), for --aug=ada only
    "ada_kimg": 100.0,
    "style_mixing_prob": 0.0,  # no style mixing
    "gen_pose_cond": False,  # no camera in the mapping network
    "gpc_reg_prob": 0.5,  # probability of a swapped camera; no effect without conditioning
    "gpc_reg_fade_kimg": 0.0,  # no fade
    "blur_fade_kimg": 0.0,  # no blur of D's inputs
    "nrr_initial": 64,  # neural rendering resolution, pixels
    "nrr_final": None,  # no change of the resolution
    "nrr_fade_kimg": 1000.0,  # no effect without nrr_final
    "density_reg": 0.25,  # weight
    "density_reg_every": 4,  # iterations
    "density_reg_p_dist": 0.004,  # perturbation of the points, world units
    "reg_type": "l1",  # type of the density regulariser
    "amp": "off",  # single precision
    "reference": None,  # the generator that tuning starts from
    "level": None,  # that of the reward's labels, else that of the generator
    "early_stop": None,  # off
    "early_stop_distance": None,
    "control": None,  # no control to quote
    # Rounds of labelling, reward training and tuning: none.
    "rounds": 0,  # tune once
    "round_pairs": 400,  # pairs to label per round
    "round_labels": SYNTHETIC,  # labels of the simulated annotator
    "round_doubtful": 0.5,  # share of pairs on which the last rewards disagree
    "round_members": 5,  # rewards per ensemble
    "round_preset": None,
    "round_aggregate": None,
    "round_start": "pretrained",
}
# None: computed from another setting in `merge_preset`, or the flag is required.
_START = {"ema_kimg": None, "rlr": None, "gen_pose_cond": False}
_LOADED = {**_START, "blur_fade_kimg": 0.0, "gpc_reg_fade_kimg": 0.0, "kimg": 2500.0, "batch": 32}
_PAPER = {**_LOADED, "kimg": 20.0, "batch": 16, "tick": 1.0, "snap": 5}
# By (--cfg, task): settings that differ from the defaults of the dataclasses.
PRESETS: dict[tuple[str, str], dict] = {
    ("ffhq", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("afhq", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("shapenet", SCRATCH): {**_START, "gamma": None, "batch": None},
    ("heads64", SCRATCH): {
        **_START,
        "cbase": 2048,
        "cmax": 64,
        "plane_layout": "fixed",
        "consistency_resolution": 32,
        "nrr_initial": 64,
        "gamma": 0.2,
        "gpc_reg_fade_kimg": 5.0,
        "blur_fade_kimg": 0.0,
        "kimg": 50.0,
        "batch": 4,
        "tick": 1.0,
        "snap": 4,
        "ema_kimg": 1.0,
    },
    ("ffhq", TUNING): {**_LOADED, "gamma": 1.0},
    ("afhq", TUNING): {**_LOADED, "gamma": 5.0, "aug": "ada"},
    ("shapenet", TUNING): {**_LOADED, "gamma": 0.3},
    ("heads64", TUNING): HEADS,
    ("ffhq", REWARDED): {**_PAPER, "gamma": 20.0},
    ("afhq", REWARDED): {**_PAPER, "gamma": 5.0, "aug": "ada"},
    ("shapenet", REWARDED): {**_PAPER, "gamma": 0.3},
    ("heads64", REWARDED): HEADS,
}
# By name of the observation: the published settings of rewards that do not observe the density field sigma.
OBSERVED: dict[str, dict] = {
    "depth": {
        "lambda_r": 1.0,
        "lambda_sigma": 0.0,
        "lambda_nose": 1.0,
        "reward_shaping": "standardised",
        "reward_clip": "-10,10",
        "consistency_gate": 1.0,
    },
    # A valid solid has the highest possible score already, so the reward needs no clip.
    "solid": {"lambda_sigma": 0.02, "reward_shaping": "none", "reward_clip": "none", "consistency_gate": 1.0},
}
