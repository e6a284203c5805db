"""Jobs on reward files: `reward join` builds an ensemble, `reward import` converts the paper's release."""

import statistics
import tempfile

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, naming, option
from eg3d_rlhf.core.seeds import SCALES
from eg3d_rlhf.core.spec import LATTICES
from eg3d_rlhf.modes.shared_flags import PATH, file_option, print_json, shared
from eg3d_rlhf.rewards.aggregates import CHOICES
from training.progress import tqdm

_written = file_option(
    "--out",
    required=True,
    help="Reward file to write (.safetensors). A description is written beside it as .json.",
)


@click.command("join", cls=GroupedCommand)
@click.argument("rewards", metavar="REWARD...", nargs=-1, required=True, type=PATH)
@_written
@option(
    "--aggregate",
    type=click.Choice(CHOICES),
    default="softmin",
    help=(
        "Aggregate of the members' scores. warm averages their weights, for members that share a trained"
        " start."
    ),
)
@option(
    "--strength",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    show_default="1, 0.5, 0.5",
    help="Strength of the aggregate: k of lcb, lambda of uwo, beta of softmin.",
)
@shared(
    "network batch device dry-run",
    network="Untuned generator whose samples set the scale of the members.",
    batch={"default": 16},
    dry_run="Join the rewards and print the description as JSON, but write nothing.",
)
def join(rewards, out, aggregate, strength, network, batch, device, dry_run) -> None:
    """Join rewards into one ensemble file whose score aggregates theirs, for train.py --reward-ckpt.

    Members are put on one scale by their scores of the same untuned samples. They should differ in their
    labels and in their initialisation; five are usual. The held-out reward must not be among them.

    \b
    Example:
        eg3d-rlhf reward join assets/reward.safetensors assets/reward-heldout.safetensors --out=r.safetensors
    """
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.reward import join as joined
    from eg3d_rlhf.rewards.reward import load_reward

    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name ending in .safetensors, got {out.name}. Rename it.")
    # a reward that is listed twice would count twice in the aggregate
    twice = next((path for i, path in enumerate(rewards) if path in rewards[:i]), None)
    if twice is not None:
        raise ValueError(f"REWARD: {twice} is listed twice. Remove one.")
    members = {str(path): load_reward(path, choose_device(device)) for path in rewards}
    with naming("--network"):
        generator = load_generator(network, choose_device(device))
    with tqdm(total=SCALES.count, desc="scales", unit="shape", dynamic_ncols=True) as bar:
        reward = joined(members, generator, aggregate, strength, batch, bar.update)
    if dry_run:
        print_json(reward.describe())
        return
    path = reward.save(out)
    # scale and members as the file records them
    known = reward.provenance
    click.echo(
        f"{path}: {aggregate} of {len(known['joined'])} members; mean {known['score_mean']:.3f}, standard"
        " deviation"
        f" {known['score_std']:.3f} over {SCALES.count} untuned samples"
    )


@click.command("import", cls=GroupedCommand, job="reward import")
@click.argument("source", metavar="SOURCE")
@_written
@option(
    "--transform",
    type=click.Choice(["config", "published"]),
    default="config",
    group="Release",
    help="Grid and value range: config, those of the configuration; published, 256 points and [0, 100].",
)
@option(
    "--lattice",
    type=click.Choice(LATTICES),
    default="straight",
    group="Release",
    help=(
        "Lattice that the written reward reads. skewed is that of its training data, but several times"
        " slower."
    ),
)
@shared("network", network="Generator whose samples are scored on both lattices.")
@option(
    "--latents",
    group="Samples",
    metavar="LIST",
    default="0-3",
    help="Seeds of the latents to score, such as 0,2-5, or none.",
)
@shared(
    "device dry-run",
    dry_run="Read and check the release and print its description as JSON, but write and score nothing.",
)
def release(source, out, transform, lattice, network, latents, device, dry_run) -> None:
    """Convert the paper's released reward to this project's format, once, and show the effect of its skewed
    training lattice.

    SOURCE is the folder with best_model.pt and release_config.yaml (or run_config.yaml), the weights file
    itself, or the word synthetic:reward for a small untrained one in the same layout. Nothing in the files is
    executed. The reward is then scored on samples of a generator, on the straight grid and on the lattice of
    its training data.

    \b
    Example:
        eg3d-rlhf reward import synthetic:reward --out=runs/example/imported.safetensors --latents=0-1
    """
    from eg3d_rlhf.experiments.media.rendering import parse_seeds
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.release import compare_lattices, import_release, write_example
    from eg3d_rlhf.rewards.reward import check_reward

    with naming("--latents"):
        # none: convert without scoring
        seeds = [] if latents == "none" else parse_seeds(latents)
    # weights are loaded as tensors only; nothing of the release is executed
    with naming("SOURCE"), tempfile.TemporaryDirectory() as folder:
        reward = import_release(
            write_example(folder) if source == "synthetic:reward" else source, transform, lattice
        )
    if dry_run:
        print_json(reward.describe())
        return
    with naming("--out"):
        path = reward.save(out)
    parameters = sum(p.numel() for p in reward.parameters())
    click.echo(
        f"{path}: {parameters:,} parameters, slab {list(reward.observation.shape[1:])} (z, y, x), {lattice}"
        " lattice"
    )
    if not seeds:
        return
    where = choose_device(device)
    with naming("--network"):
        generator = load_generator(network, where).generator
        check_reward(reward, generator)
    compared = compare_lattices(reward.to(where), generator, seeds)
    scores = list(tqdm(compared, total=len(seeds), desc="scoring on both lattices", unit="seed"))
    click.echo(f"{'seed':>8}  {'straight':>12}  {'skewed':>12}  {'difference':>12}")
    # a last row with the mean over the seeds
    means = (statistics.fmean(s[1] for s in scores), statistics.fmean(s[2] for s in scores))
    for name, straight, skewed in (*scores, ("mean", *means)):
        click.echo(f"{name:>8}  {straight:12.6f}  {skewed:12.6f}  {straight - skewed:+12.6f}")
