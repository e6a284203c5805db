"""The job `generator improve`: improves single samples of a generator by a reward, with unchanged weights.

Each sample is optimised by gradient ascent on its style vectors (eg3d_rlhf.tuning.gan.latent_search). This
module reads the flags and opens the files; eg3d_rlhf.evaluation.improved_samples does the work.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import combine_decorators, option, options_from_settings, prefix_errors
from eg3d_rlhf.core.input_paths import check_latent_network, check_latents, check_reward_file
from eg3d_rlhf.experiments.mode import Flags, Mode
from eg3d_rlhf.modes.shared_flags import FILE, is_latents_file, rare_option, reject_truncation, shared
from eg3d_rlhf.modes.weak_reward import weak_reward_option
from eg3d_rlhf.tuning.gan.search_settings import AUTO, TITLE, SearchConfig, parse_steps

if TYPE_CHECKING:
    from eg3d_rlhf.evaluation.improved_samples import Setup
    from eg3d_rlhf.experiments.run import Run


@dataclass(frozen=True, kw_only=True)
class ImproveRun:
    """Settings of a run: generator, latents, rewards and search. Files are given by path."""

    network: str | None = None  # None: the bundled generator, or that of the file of latents
    latents: str  # seeds as a list, or a file of latents
    psi: float = 1.0  # truncation of the seeds
    cutoff: int = 14
    reward: str | None = None  # None: the bundled reward
    heldout_reward: str | None = None  # None: with the bundled reward the bundled held-out reward, else none
    batch: int = 8
    sheets: bool = True
    config: SearchConfig


def resolve(flags: Flags) -> ImproveRun:
    """Build the settings of the run from the flags.

    Raises: ValueError that names a flag with a wrong value, or two flags that exclude each other.
    """
    if flags["latents"] is None:
        raise ValueError(
            "--latents is missing. Pass the seeds of the samples, such as --latents=0,2-5, or a file of"
            " latents."
        )
    # Stored style vectors already contain their truncation, so --psi and --cutoff do not apply.
    if is_latents_file(flags["latents"]):
        reject_truncation(flags.written, flags["latents"])
    flags.check_applies(["seed"], False, "the search has no random numbers")
    flags.check_applies(["gate_quantile"], flags["gate"], "--no-gate switches the gate off")
    # With a fixed number of steps, the settings of the automatic stop would be ignored silently.
    steps = parse_steps(flags["steps"])
    flags.check_applies(
        ["max_steps", "patience"], steps == AUTO, f"--steps={steps} fixes the number of steps"
    )
    search_config = SearchConfig(steps=steps, gate=flags["gate"], **flags.values_for(SearchConfig))
    field_names = [name for name in ImproveRun.__dataclass_fields__ if name != "config"]
    # Paths become texts, because the settings are recorded as JSON.
    flag_values: dict[str, Any] = {
        name: str(flags[name]) if isinstance(flags[name], Path) else flags[name] for name in field_names
    }
    # Only the bundled pair of rewards was trained for this purpose.
    if flag_values["reward"] is None and flag_values["heldout_reward"] is None:
        flag_values["heldout_reward"] = str(bundled.HELDOUT_REWARD)
    return ImproveRun(**flag_values, config=search_config)


def open_setup(settings: ImproveRun, run: "Run") -> "Setup":
    """Load and check the files that the settings name, and record them as inputs of the run.

    Args:
        settings: settings of the run.
        run: the run, on whose device the networks are loaded.

    Raises: ValueError that names the flag of a file that is missing or does not fit.
    """
    click.echo("Loading the generator and the rewards.")
    # imported here, because --help must not load these modules
    from eg3d_rlhf.evaluation.improved_samples import Setup
    from eg3d_rlhf.experiments.media.rendering import parse_seeds
    from eg3d_rlhf.generators import load_generator, ws_of_seeds
    from eg3d_rlhf.generators.stored_latents import load_stored
    from eg3d_rlhf.rewards.reward import load_reward
    from eg3d_rlhf.rewards.stated_accuracy import RewardUse, announce_reward
    from eg3d_rlhf.tuning.gan.latent_search import check_optimisable, check_search

    psi = settings.psi
    if is_latents_file(settings.latents):
        with prefix_errors("--latents"):
            # A file of latents contains the path of its generator; --network may name a copy of it.
            stored, loaded = load_stored(settings.latents, settings.network, run.device)
        ws = stored.ws.to(run.device)
        seeds = tuple(stored.seeds)
        psi = stored.psi
    else:
        with prefix_errors("--latents"):
            # a seed that is listed twice is improved once
            seeds = tuple(dict.fromkeys(parse_seeds(settings.latents)))
        with prefix_errors("--network"):
            loaded = load_generator(settings.network, run.device)
        # Before the mapping, which files of finished shapes do not have.
        check_optimisable(loaded.generator)
        ws = ws_of_seeds(loaded.generator, seeds, settings.psi, settings.cutoff)
    # These names are recorded in the run, so they are those of the flags.
    input_files: dict[str, str | Path | None] = {
        "reward": settings.reward or bundled.REWARD,
        "heldout-reward": settings.heldout_reward,
    }
    rewards = {}
    for flag_name, file_path in input_files.items():
        if file_path is not None:
            with prefix_errors(f"--{flag_name}"):
                rewards[flag_name] = load_reward(file_path, run.device)
    # The rewards may read another observation or grid than this generator has.
    check_search(loaded.generator, settings.config, rewards["reward"], rewards.get("heldout-reward"))
    input_files |= {
        "network": loaded.path,
        "latents": settings.latents if is_latents_file(settings.latents) else None,
    }
    run.inputs |= {name: file_path for name, file_path in input_files.items() if file_path is not None}
    # The last check, so that another mistake is reported in one line.
    for flag_name, reward in rewards.items():
        use = RewardUse(
            tunes=flag_name == "reward",
            # The reward of a resumed run was accepted when the run began.
            allows_weak=run.resumed is not None or bool(run.flags.get("weak_reward")),
        )
        announce_reward(reward, f"--{flag_name}", use)
    return Setup(
        loaded=loaded,
        ws=ws,
        seeds=seeds,
        psi=psi,
        reward=rewards["reward"],
        heldout_reward=rewards.get("heldout-reward"),
        config=settings.config,
        batch=settings.batch,
        sheets=settings.sheets,
    )


def work(settings: ImproveRun, setup: "Setup", run: "Run") -> None:
    """Improve the samples that the run lacks, write the results, and print what was found."""
    # imported here, because --help must not load this module
    from eg3d_rlhf.evaluation import improved_samples

    del settings  # `setup` contains them
    ascent, threshold = improved_samples.run_batches(run, setup)
    summary = improved_samples.summarise(setup, ascent, threshold)
    run.write("improve.json", summary)
    improved_samples.write_latents(run.folder, setup, ascent)
    sheet_names = improved_samples.write_sheets(run.folder, setup, ascent) if setup.sheets else []
    click.echo("\n".join(improved_samples.summary_sentences(summary)))
    click.echo(
        f"\nWritten to {run.folder}: improved.safetensors, before.safetensors, improve.json"
        + "".join(f", {sheet_name}" for sheet_name in sheet_names)
    )


_FLAGS = combine_decorators(
    shared(
        "network latents",
        "psi cutoff",
        network={
            "show_default": "the bundled generator, or that of the file of latents",
            "check": check_latent_network,
        },
        latents={
            "metavar": "LIST|FILE",
            "check": check_latents,
            "help": (
                "Samples to improve: seeds as a list with ranges, such as 0,2-5, or a file of latents"
                " (.safetensors)."
            ),
        },
        psi={
            "default": 1.0,
            "help": "Truncation psi of the samples that a list of seeds names; 1 means no truncation.",
        },
    ),
    option(
        "--reward",
        group="What",
        metavar="FILE",
        type=FILE,
        check=check_reward_file,
        show_default="the bundled reward",
        help="Reward file by which the samples are improved.",
    ),
    shared(
        "heldout-reward",
        heldout_reward={
            "type": FILE,
            "show_default": "the bundled held-out reward if --reward is not given, else none",
            "help": (
                "Held-out reward file that stops each sample (--steps=auto) and detects over-optimisation."
            ),
        },
    ),
    weak_reward_option(group="What"),
    option(
        "--steps",
        group=TITLE,
        metavar="auto|INT",
        default=AUTO,
        help=(
            "Number of steps of each sample. auto stops a sample where the held-out reward stops rising, and"
            " keeps its best step."
        ),
    ),
    option(
        "--gate/--no-gate",
        group=TITLE,
        default=True,
        help=(
            "Leave samples unchanged that already score above a quantile of the generator's own scores."
            " --no-gate optimises all samples, which harms intact ones."
        ),
    ),
    options_from_settings(SearchConfig),
    shared("batch", batch={"default": 8}),
    rare_option(
        "--sheets/--no-sheets",
        default=True,
        help="Write images of each sample before and after the search.",
    ),
)
HELP = """Improve single samples of a generator by a reward: gradient ascent on the latent of each sample,
with unchanged weights. Use it for a few samples that matter. Tuning improves every sample at no cost per
sample.

The command writes a run folder with the latents before and after (files that label, study and samples
accept), improve.json with the scores by step, and images of each sample before and after.

\b
Example:
    eg3d-rlhf generator improve --latents=200000-200003 --steps=2
"""
IMPROVE = Mode(
    name="improve",
    settings=ImproveRun,
    open=open_setup,
    work=work,
    flags=_FLAGS,
    resolve=resolve,
    help=HELP,
)
main = IMPROVE.command
