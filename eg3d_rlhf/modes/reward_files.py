"""Jobs on rewards' files: several joined into one, and the paper's release read."""

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
    help="Reward to write (.safetensors; its description is written beside it as .json).",
)


@click.command("join", cls=GroupedCommand)
@click.argument("rewards", metavar="REWARD...", nargs=-1, required=True, type=PATH)
@_written
@option(
    "--aggregate",
    type=click.Choice(CHOICES),
    default="softmin",
    help=(
        "What the members become; warm is the mean of their weights, for members that share a trained start."
    ),
)
@option(
    "--strength",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    show_default="1, 0.5, 0.5",
    help="k of lcb, lambda of uwo, beta of softmin.",
)
@shared(
    "network batch device dry-run",
    network="The rewards' generator, untuned.",
    batch={"default": 16},
    dry_run="Check and join everything, print the description as JSON, write nothing.",
)
def join(rewards, out, aggregate, strength, network, batch, device, dry_run) -> None:
    """Join rewards into one file whose score is an aggregate of theirs, for train.py --reward-ckpt.

    Members are put on one scale by their scores of the same untuned samples. They should differ in their
    labels and in their initialisation; five are usual. The reward that watches a run must not be among them.

    \b
    Example:
        eg3d-rlhf reward join assets/reward.safetensors assets/reward-heldout.safetensors --out=r.safetensors
    """
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.rewards.reward import join as joined
    from eg3d_rlhf.rewards.reward import load_reward

    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name ending in .safetensors, got {out.name}. Rename it.")
    twice = next((path for i, path in enumerate(rewards) if path in rewards[:i]), None)
    if twice is not None:
        raise ValueError(f"REWARD: expected different files, got {twice} again. Leave one out.")
    members = {str(path): load_reward(path, choose_device(device)) for path in rewards}
    with naming("--network"):
        generator = load_generator(network, choose_device(device))
    with tqdm(total=SCALES.count, desc="scales", unit="shape", dynamic_ncols=True) as bar:
        reward = joined(members, generator, aggregate, strength, batch, bar.update)
    if dry_run:
        print_json(reward.describe())
        return
    path = reward.save(out)
    known = reward.provenance
    click.echo(
        f"{path}: {aggregate} of {len(known['joined'])} members; mean {known['score_mean']:.3f}, deviation"
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
    help="Grid and value range from the configuration, or the published 256 points and [0, 100].",
)
@option(
    "--lattice",
    type=click.Choice(LATTICES),
    default="straight",
    group="Release",
    help=(
        "Lattice that the written reward reads; skewed is the one it was trained on, and several times"
        " slower."
    ),
)
@shared("network", network="Generator whose samples are scored.")
@option(
    "--latents",
    group="Samples",
    metavar="LIST",
    default="0-3",
    help="Latents to score by their seeds, such as 0,2-5, or none.",
)
@shared(
    "device dry-run",
    dry_run="Read and check everything, print what was found as JSON, write and score nothing.",
)
def release(source, out, transform, lattice, network, latents, device, dry_run) -> None:
    """Convert the paper's released reward to this project's format, once, and show what its skewed training
    lattice makes of it.

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
        seeds = [] if latents == "none" else parse_seeds(latents)
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
    means = (statistics.fmean(s[1] for s in scores), statistics.fmean(s[2] for s in scores))
    for name, straight, skewed in (*scores, ("mean", *means)):
        click.echo(f"{name:>8}  {straight:12.6f}  {skewed:12.6f}  {straight - skewed:+12.6f}")
