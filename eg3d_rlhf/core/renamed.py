"""Tables of the old names (version 0.1) and new names of jobs, flags, values, make targets and files.

This is the only module that contains old names. A command line with an old name ends with an error that names
the new one, and exit code 2; there are no aliases. docs/start/migrating.md shows the same tables, and
tests/core/test_renamed.py compares the page, the commands and the Makefile with this module. The module will
be removed in version 1.0.

What version 0.1 wrote to disk is read by `eg3d_rlhf.experiments.version_0_1`.
"""

from collections.abc import Mapping

BUILDERS = ("build", "shapes", "features", "toy-flow", "view-prior")  # former jobs `assets NAME`
# Old name of a job of eg3d-rlhf -> the command to run instead.
JOBS = {
    "report proof": "eg3d-rlhf report controlled-study",
    "report zoo": "eg3d-rlhf report rewards",
    "report pictures": "eg3d-rlhf report images",
    "flow draw": "eg3d-rlhf flow sample",
    **{f"assets {name}": f"python -m builders.{name.replace('-', '_')}" for name in BUILDERS},
}
# Old name -> new name of a make target, and of the make variable with further arguments of the target.
TARGETS = {"proof": "controlled-study", "zoo": "rewards"}
VARIABLES = {"PROOF_ARGS": "CONTROLLED_STUDY_ARGS", "ZOO_ARGS": "REWARDS_ARGS"}

_OUTDIR = {"--out": "--outdir"}
_HELDOUT = {"--reward-watch": "--heldout-reward"}
_CRITERION = {"--question": "--criterion"}
_FLOW = {"--conditions": "--conditioning", "--set judge_batch": "--set evaluation_batch"}
_LOOP = {"--set condition_dropout": "--set conditioning_dropout"}
_GAN = {
    **_HELDOUT,
    "--anchor-gate": "--consistency-gate",
    "--set anchor_psi": "--set consistency_psi",
}
_REWARD = {
    "--out": "--run-dir",
    "--anchors": "--reference-samples",
    "--set question": "--set criterion",
}
_MESH_REWARD = {"--set shuffled": "--set randomised"}
_ONLINE = {
    **_FLOW,
    "--set max_away": "--set max_drift",
    "--set draws": "--set noise_samples",
    "--set plain": "--set unweighted",
}
# Words of a command -> old names -> new names of its flags and of its settings without a flag ("--set
# NAME"). The tables are separate for each command, because a flag that was renamed in one command may
# exist in another.
FLAGS: dict[str, dict[str, str]] = {
    "train --mode=gan": _GAN,
    "train --mode=circular-dpo": {**_FLOW, **_LOOP},
    "train --mode=online": _ONLINE,
    "train --mode=grpo": _ONLINE,
    "train --mode=offline": _FLOW,
    "train --mode=reward": _REWARD,
    "train --mode=mesh-reward": _MESH_REWARD,
    "label": {"--questions": "--criteria"},
    "label export": _CRITERION,
    "label leaderboard": _CRITERION,
    "label synthetic": {"--shuffled": "--randomised"},
    "label elo": {"--draws": "--ties"},
    "study report": {"--pictures": "--images"},
    "reward latent": {"--conditions": "--conditioning"},
    "reward import": {"--seeds": "--latents"},
    "reward best-of-n": {**_OUTDIR, **_HELDOUT},
    "check-assets": _OUTDIR,
    "score": _OUTDIR,
    "flow new": {"--pictures": "--images", "--conditions": "--conditioning"},
    "flow tune": _LOOP,
    "flow export": _OUTDIR,
    "report evaluate": {**_OUTDIR, **_HELDOUT},
    "report attribute": {**_OUTDIR, "--set draws": "--set randomisations"},
    "report embed": _OUTDIR,
    "report sweep": _OUTDIR,
    "report all": _OUTDIR,
    "report images": _OUTDIR,
    "report seeds": _OUTDIR,
    "report solid": {"--conditions": "--conditioning"},
    "report controlled-study": {**_OUTDIR, "--draws": "--label-sets"},
    "report rewards": _OUTDIR,
    "train --mode=inversion": {**_HELDOUT, "--seeds": "--latents"},
    "samples images": {"--set shape_level": "--set level"},
    "python -m benchmarks": _OUTDIR,
}
# Jobs that are another way to start a mode of training. They have the flags of that mode.
MODES_OF_JOBS = {
    "reward train": "train --mode=reward",
    "reward mesh": "train --mode=mesh-reward",
    "generator invert": "train --mode=inversion",
}
_LOSSES = ("nft", "grpo", "grpo-plain", "grpo-guard", "dppo", "dgpo", "dpo")
_ARMS = {f"{loss}-shuffled": f"{loss}-randomised" for loss in _LOSSES}
# (words of a command, flag or "--set NAME") -> old values -> new values. They also apply to the elements of a
# comma-separated list.
VALUES: dict[tuple[str, str], dict[str, str]] = {
    ("report heads", "--held-out"): {"judge": "evaluation"},
    ("reward best-of-n", "--reward-ckpt"): {"soundness": "mesh-validity"},
    ("train --mode=circular-dpo", "--set roles"): {"op": "tuned"},
    ("flow tune", "--set roles"): {"op": "tuned"},
    ("train --mode=circular-dpo", "--ablate"): {
        "anchor": "regulariser",
        "shuffled": "randomised",
        "turned": "inverted",
    },
    ("train --mode=online", "--arms"): _ARMS,
    ("train --mode=grpo", "--arms"): _ARMS,
    ("train --mode=offline", "--arms"): {
        "shuffled": "randomised",
        "dpo-shuffled": "dpo-randomised",
    },
    ("report controlled-study", "--only"): {
        "coin": "randomised",
        "turned": "inverted",
        "filter": "post-processing",
    },
}
# Commands whose --seeds was the number of trainings in version 0.1. It is a list of training seeds now.
COUNTED = (
    "train --mode=circular-dpo",
    "train --mode=online",
    "train --mode=grpo",
    "train --mode=offline",
    "train --mode=mesh-reward",
    "reward latent",
)
# Old path -> new path of files that commands write, and of bundled files.
FILES = {
    "WORK/conditions.safetensors": "WORK/conditioning.safetensors",
    "reward-watch.safetensors, .json (bundled)": "reward-heldout.safetensors, .json (bundled)",
    "runs/proof/proof.json, .md, .png": "runs/controlled-study/controlled-study.json, .md, .png",
    "runs/zoo/zoo.json, .md, .png": "runs/rewards/rewards.json, .md, .png",
    "runs/zoo/zoo-latents.png": "runs/rewards/rewards-latents.png",
    "census/ (default of check-assets)": "mesh-validation/",
}


def new_flag(command_words: str, typed_flag: str, flags_of_command: Mapping[str, object]) -> str | None:
    """Return the new name of a flag that a command does not have, or None if the flag was not renamed.

    A command has either --out (a file) or --outdir (a folder). If the flag is the other one of the two, the
    function returns the one that the command has.

    Args:
        command_words: words of the command, such as "report all".
        typed_flag: the flag as it was typed, or "--set NAME" for a setting without a flag.
        flags_of_command: flags that the command has, as keys.
    """
    new_name_by_old = FLAGS.get(command_words, {})
    bare_name = typed_flag.removeprefix("--set ").lstrip("-")
    # The user may have typed a flag for a setting without a flag, or the reverse: both forms are looked up.
    for spelling in (f"--{bare_name.replace('_', '-')}", f"--set {bare_name.replace('-', '_')}"):
        if spelling in new_name_by_old:
            return new_name_by_old[spelling]
    counterpart = {"out": "--outdir", "outdir": "--out"}.get(bare_name)
    return counterpart if counterpart in flags_of_command else None


def new_value(command_words: str, flag: str, flag_value: str) -> tuple[str, str] | None:
    """Return (old name, new name) for the first renamed name in a value, or None if it contains none.

    Args:
        command_words: words of the command, such as "report all".
        flag: flag, or "--set NAME" for a setting without a flag.
        flag_value: text of the value; it may be a comma-separated list of names.
    """
    new_name_by_old = VALUES.get((command_words, flag), {})
    for list_element in flag_value.split(","):
        old_name = list_element.strip()
        if old_name in new_name_by_old:
            return old_name, new_name_by_old[old_name]
    return None


def check_seeds(command_words: str, seeds_value: str) -> None:
    """Raise ValueError for --seeds with a single number above 0, whose meaning changed since version 0.1.

    In version 0.1 the number was the number of trainings. It would now be a single training seed.

    Args: command_words: words of the command; seeds_value: value of --seeds.
    """
    if command_words in COUNTED and seeds_value.strip().isdecimal() and int(seeds_value) > 0:
        training_count = int(seeds_value)
        # The message shows at most three seeds. A comma after a single seed marks a list.
        list_ending = "," if training_count == 1 else ",..." if training_count > 3 else ""
        seed_list = ",".join(map(str, range(min(training_count, 3)))) + list_ending
        raise ValueError(
            f"--seeds={seeds_value}: expected a comma-separated list of training seeds. In version 0.1 the"
            f" value was the number of trainings. For as many trainings write --seeds={seed_list}; for one"
            f" training with the seed {training_count} write --seeds={training_count}, with the comma at the"
            " end."
        )
