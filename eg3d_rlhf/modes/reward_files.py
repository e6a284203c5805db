"""Jobs on reward files: `reward join` combines rewards into an ensemble, and `reward import` converts the
reward that the authors of the paper released.
"""

import statistics
import tempfile
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, argument, choose_device, option, prefix_errors
from eg3d_rlhf.core.input_paths import check_reward_file
from eg3d_rlhf.core.seeds import SCALES, parse_seeds
from eg3d_rlhf.core.spec import LATTICES
from eg3d_rlhf.modes.shared_flags import PATH, file_option, print_json, shared
from eg3d_rlhf.rewards.aggregates import CHOICES
from training.input_paths import existing_path
from training.progress import tqdm

EXAMPLE = "synthetic:reward"  # value of SOURCE for a small untrained reward
_written = file_option(
    "--out",
    required=True,
    help="Reward file to write (.safetensors). A .json file with its description is written beside it.",
)


def check_release(source: str) -> None:
    """Raise FileNotFoundError if SOURCE is neither a folder nor a file, and not the word of the example."""
    if source != EXAMPLE:
        with prefix_errors("SOURCE"):
            existing_path(source, "import_release")


def check_reward_name(out: Path) -> None:
    """Raise ValueError if --out has not the ending of a reward file."""
    if out.suffix != ".safetensors":
        raise ValueError(
            f"--out: the name {out.name} does not end in .safetensors. Choose a name with this ending."
        )


def _parse_latents(latents: str) -> list[int]:
    """Parse the value of --latents, a list of seeds or the word none."""
    return [] if latents == "none" else parse_seeds(latents)


@click.command("join", cls=GroupedCommand)
@argument("rewards", check_reward_file, metavar="REWARD...", nargs=-1, required=True, type=PATH)
@_written
@option(
    "--aggregate",
    type=click.Choice(CHOICES),
    # softmin is a pessimistic aggregate: members with low scores have more weight
    default="softmin",
    help=(
        "Function that combines the scores of the members: their mean (mean), the lowest score (min), the"
        " mean minus k standard deviations (lcb), the mean minus lambda times the variance (uwo), or a soft"
        " minimum (softmin). warm averages the weights of the members instead of their scores; all members"
        " must then have been trained from the same trained network."
    ),
)
@option(
    "--strength",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    show_default="1 for lcb, 0.5 for uwo and softmin",
    help="Parameter of the aggregate: k of lcb, lambda of uwo, or beta of softmin.",
)
@shared(
    "network batch device dry-run",
    network="Untuned generator by whose samples the scores of the members are standardised.",
    batch={"default": 16},
    dry_run="Join the rewards and print the description as JSON, but write nothing.",
)
def join(rewards, out, aggregate, strength, network, batch, device, dry_run) -> None:
    """Combine several rewards, the members, into one ensemble file for train.py --reward-ckpt. The score of
    the ensemble is an aggregate of the members' scores.

    The scores of each member are standardised by its scores of the same untuned samples. Members should
    differ in their labels and in their initialisation; five members are usual. The held-out reward must not
    be a member.

    \b
    Example:
        eg3d-rlhf reward join assets/reward.safetensors assets/reward-heldout.safetensors --out=r.safetensors
    """
    check_reward_name(out)
    # A reward that is listed twice would count twice in the aggregate.
    repeated_path = next((path for index, path in enumerate(rewards) if path in rewards[:index]), None)
    if repeated_path is not None:
        raise ValueError(f"REWARD: {repeated_path} is listed twice. Remove one of the two arguments.")

    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.reward import join as join_rewards
    from eg3d_rlhf.rewards.reward import load_reward
    from eg3d_rlhf.rewards.stated_accuracy import describe_inputs

    # The paths are recorded in the ensemble file.
    members = {str(path): load_reward(path, choose_device(device)) for path in rewards}
    # an error in this block begins with the name --network
    with prefix_errors("--network"):
        generator = load_generator(network, choose_device(device))
    with tqdm(total=SCALES.count, desc="scales", unit="shape", dynamic_ncols=True) as progress_bar:
        # Each member scores the same untuned samples, from which its mean and standard deviation follow.
        reward = join_rewards(members, generator, aggregate, strength, batch, progress_bar.update)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json(reward.describe())
        return
    path = reward.save(out)
    # the record in the reward file of how it was made
    provenance = reward.provenance
    click.echo(
        f"{path}: {aggregate} of {len(provenance['joined'])} members; mean {provenance['score_mean']:.3f},"
        f" standard deviation {provenance['score_std']:.3f} over {SCALES.count} untuned samples"
    )
    click.echo(
        f"The accuracy of the ensemble was not measured. Members: {describe_inputs(provenance['inputs'])}"
    )


@click.command("import", cls=GroupedCommand, job="reward import")
@argument("source", check_release, metavar="SOURCE")
@_written
@option(
    "--transform",
    type=click.Choice(["config", "published"]),
    default="config",
    group="Release",
    help=(
        "Source of the grid and the range of densities that the reward reads: config, the configuration file"
        " of the release; published, the paper's 256 points per axis and [0, 100]."
    ),
)
@option(
    "--lattice",
    type=click.Choice(LATTICES),
    default="straight",
    group="Release",
    help=(
        "Lattice of points at which the written reward reads the density: a straight grid, or the skewed"
        " lattice of the reward's training data, which is several times slower."
    ),
)
@shared("network", network="Generator whose samples are scored on both lattices.")
@option(
    "--latents",
    check=_parse_latents,
    group="Samples",
    metavar="LIST",
    default="0-3",
    help="Seeds of the latents that are scored on both lattices, such as 0,2-5; none scores no samples.",
)
@shared(
    "device dry-run",
    dry_run="Read and check the release and print its description as JSON, but write and score nothing.",
)
def release(source, out, transform, lattice, network, latents, device, dry_run) -> None:
    """Convert the reward that the authors of the paper released to the format of this project. Then print its
    scores of samples of a generator on a straight grid and on the skewed lattice of its training data.

    SOURCE is the folder with best_model.pt and release_config.yaml (or run_config.yaml), the file of weights
    itself, or the word synthetic:reward for a small untrained reward in the same layout. No code in the files
    is executed.

    \b
    Example:
        eg3d-rlhf reward import synthetic:reward --out=runs/example/imported.safetensors --latents=0-1
    """
    seeds = _parse_latents(latents)
    check_reward_name(out)
    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.release import compare_lattices, import_release, write_example
    from eg3d_rlhf.rewards.reward import check_reward

    # The folder receives the example of synthetic:reward. Weights are loaded as tensors; no code is executed.
    with prefix_errors("SOURCE"), tempfile.TemporaryDirectory() as folder:
        reward = import_release(write_example(folder) if source == EXAMPLE else source, transform, lattice)
    # --dry-run ends here; nothing has been written so far
    if dry_run:
        print_json(reward.describe())
        return
    # an error in this block begins with the name --out
    with prefix_errors("--out"):
        written_path = reward.save(out)
    parameter_count = sum(parameter.numel() for parameter in reward.parameters())
    click.echo(
        f"{written_path}: {parameter_count:,} parameters, slab {list(reward.observation.shape[1:])}"
        f" (z, y, x), {lattice} lattice"
    )
    if not seeds:
        return
    target_device = choose_device(device)
    if network is None and source != EXAMPLE:
        click.echo(
            "Warning: --network is missing, so samples of the bundled generator are scored. Add"
            " --network=FILE with the generator that is to be tuned, or --latents=none.",
            err=True,
        )
    # an error in this block begins with the name --network
    with prefix_errors("--network"):
        generator = load_generator(network, target_device).generator
        # raises ValueError if the reward cannot read the densities of this generator
        check_reward(reward, generator)
    # An iterator: each seed is scored when the progress bar asks for it.
    score_rows = compare_lattices(reward.to(target_device), generator, seeds)
    lattice_scores = list(tqdm(score_rows, total=len(seeds), desc="scoring on both lattices", unit="seed"))
    click.echo(f"{'seed':>8}  {'straight':>12}  {'skewed':>12}  {'difference':>12}")
    # A score is (seed, score on the straight grid, score on the skewed lattice). The last row of the table is
    # the mean over the seeds.
    mean_scores = (
        statistics.fmean(score[1] for score in lattice_scores),
        statistics.fmean(score[2] for score in lattice_scores),
    )
    for row_name, straight_score, skewed_score in (*lattice_scores, ("mean", *mean_scores)):
        click.echo(
            f"{row_name:>8}  {straight_score:12.6f}  {skewed_score:12.6f} "
            f" {straight_score - skewed_score:+12.6f}"
        )
