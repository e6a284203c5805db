"""Names that version 0.1 had for jobs, flags, values, make targets and files, and the present ones.

This is the only table of old names. A command line that uses one of them is rejected with the new name and
exit code 2; there are no aliases. docs/start/migrating.md shows the same tables, and
tests/core/test_renamed.py holds the page, the commands and the Makefile against this module. To be removed
at 1.0.

What version 0.1 wrote to disk is read by `eg3d_rlhf.experiments.version_0_1`.
"""

from collections.abc import Mapping

BUILDERS = ("build", "shapes", "features", "toy-flow", "view-prior")
# Jobs of eg3d-rlhf, with the command to run instead.
JOBS = {
    "report proof": "eg3d-rlhf report controlled-study",
    "report zoo": "eg3d-rlhf report rewards",
    "report pictures": "eg3d-rlhf report images",
    "flow draw": "eg3d-rlhf flow sample",
    **{f"assets {name}": f"python -m builders.{name.replace('-', '_')}" for name in BUILDERS},
}
# Targets of the Makefile, and the variables that hold further arguments of theirs.
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
# Flags and rare settings of a command: a flag may keep its name elsewhere.
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
    "python -m benchmarks": _OUTDIR,
}
# Commands of a mode that are jobs, too.
MODES_OF_JOBS = {
    "reward train": "train --mode=reward",
    "reward mesh": "train --mode=mesh-reward",
    "generator invert": "train --mode=inversion",
}
_LOSSES = ("nft", "grpo", "grpo-plain", "grpo-guard", "dppo", "dgpo", "dpo")
_ARMS = {f"{loss}-shuffled": f"{loss}-randomised" for loss in _LOSSES}
# Values of a flag or a rare setting of a command, also within a list.
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
# Commands whose --seeds was a number of trainings, counted from --seed, and is a list of training seeds now.
COUNTED = (
    "train --mode=circular-dpo",
    "train --mode=online",
    "train --mode=grpo",
    "train --mode=offline",
    "train --mode=mesh-reward",
    "reward latent",
)
# Files and folders that commands write, or that the package brings.
FILES = {
    "WORK/conditions.safetensors": "WORK/conditioning.safetensors",
    "reward-watch.safetensors, .json (bundled)": "reward-heldout.safetensors, .json (bundled)",
    "runs/proof/proof.json, .md, .png": "runs/controlled-study/controlled-study.json, .md, .png",
    "runs/zoo/zoo.json, .md, .png": "runs/rewards/rewards.json, .md, .png",
    "runs/zoo/zoo-latents.png": "runs/rewards/rewards-latents.png",
    "census/ (default of check-assets)": "mesh-validation/",
}


def new_flag(job: str, typed: str, known: Mapping[str, object]) -> str | None:
    """Return the present name of a flag that a command does not have, or None for one that never was.

    Args: typed: the flag, or "--set name" of a rare setting, as it was typed; known: the flags that the
        command has. Of --out and --outdir, a command has one: the first is a file, the second a folder.
    """
    names = FLAGS.get(job, {})
    name = typed.removeprefix("--set ").lstrip("-")
    for spelling in (f"--{name.replace('_', '-')}", f"--set {name.replace('-', '_')}"):
        if spelling in names:
            return names[spelling]
    other = {"out": "--outdir", "outdir": "--out"}.get(name)
    return other if other in known else None


def new_value(job: str, flag: str, value: str) -> tuple[str, str] | None:
    """Return the first old name in a value, or in a list with commas, and the present one; None for none."""
    names = VALUES.get((job, flag), {})
    return next(((part, names[part]) for part in map(str.strip, value.split(",")) if part in names), None)


def check_seeds(job: str, text: str) -> None:
    """Raise ValueError for a single number above 0, which meant a number of trainings in version 0.1."""
    if job in COUNTED and text.strip().isdecimal() and int(text) > 0:
        count = int(text)
        end = "," if count == 1 else ",..." if count > 3 else ""
        listed = ",".join(map(str, range(min(count, 3)))) + end
        raise ValueError(
            f"--seeds={text}: expected a list of training seeds with commas. In version 0.1 this was the"
            f" number of trainings: write --seeds={listed} for {count} of them, or --seeds={count}, for the"
            f" single training seed {count}."
        )
