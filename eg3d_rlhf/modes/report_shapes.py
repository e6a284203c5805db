"""The jobs `report heads` and `report solid`, which compare the shapes of several generators in a table."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from eg3d_rlhf.core.cli import (
    GroupedCommand,
    argument,
    choose_device,
    option,
    options_from_settings,
    parse_numbers,
    prefix_errors,
)
from eg3d_rlhf.core.input_paths import check_network
from eg3d_rlhf.core.seeds import LATENTS, VALIDATION
from eg3d_rlhf.evaluation.settings import CHOOSE, HELD_OUT_RANGES
from eg3d_rlhf.modes.shared_flags import PATH, name_option, print_json, shared
from eg3d_rlhf.tuning.flow.families import check_root
from eg3d_rlhf.tuning.gan.search_settings import SearchConfig
from training.storage import write_atomic

# Values of --held-out of `report latent-search`.
SEARCH_RANGES = {"latents": LATENTS, "validation": VALIDATION}
# Arguments of the option --out of the jobs that write one.
TO_JSON = {
    "metavar": "FILE",
    "type": click.Path(path_type=Path, dir_okay=False),
    "default": None,
    "help": "JSON file to which the table is also written.",
}


def network_names(networks: Sequence[Path]) -> list[str]:
    """Return distinct names of networks for the rows of a table.

    A name consists of the last parts of the network's path: as few parts as make all names distinct. The name
    of a file has no suffix.

    Args:
        networks: network files and run folders.

    Raises: click.UsageError if a network is listed twice.
    """
    path_parts = [
        path.resolve().with_suffix("").parts if path.is_file() else path.resolve().parts for path in networks
    ]
    # Parent folders are added until all names differ.
    for part_count in range(1, max(map(len, path_parts), default=1) + 1):
        candidate_names = ["/".join(parts[-part_count:]) for parts in path_parts]
        if len(set(candidate_names)) == len(candidate_names):
            return candidate_names
    raise click.UsageError("[FILE|RUN]: the same network is listed twice. Remove one of the two arguments.")


def _reject_seed_of_validation(seed: int, latent_set: str) -> None:
    """Raise ValueError if --seed shall shift the validation latents, which are one fixed set."""
    if seed and latent_set == "validation":
        raise ValueError(
            f"--seed={seed} has no effect on --held-out=validation, which is one fixed set. Remove --seed."
        )


@click.command("heads", cls=GroupedCommand, job="report heads")
@argument("networks", check_network, metavar="[FILE|RUN]...", nargs=-1, type=PATH)
@shared(
    "before n seed out",
    before="Generator before tuning: a network file or a run folder.",
    seed="Number that shifts the held-out latents: another number selects other latents.",
    n={
        "metavar": "LATENTS",
        "type": click.IntRange(min=2),
        "default": 64,
        "help": "Number of held-out latents that are compared with their ground-truth heads.",
    },
    out=TO_JSON,
)
@option(
    "--held-out",
    "latent_set",
    type=click.Choice(list(HELD_OUT_RANGES)),
    # settings must not be chosen on the latents of the published tables
    default="evaluation",
    help=(
        "Set of latents that no training uses: evaluation is the set of the published tables of networks,"
        " latents that of the controlled study and of the baselines, and validation another set, for choosing"
        " settings."
    ),
)
def heads(
    networks: tuple[Path, ...],
    before: Path | None,
    latent_set: str,
    n: int,
    seed: int,
    out: Path | None,
) -> None:
    """Compare the shapes of generators of synthetic heads with the ground-truth heads of their latents. The
    table has one line per generator: the error reduction on heads that were defective before tuning, and the
    damage to intact heads.

    \b
    Example:
        eg3d-rlhf report heads runs/00000-* --held-out=validation --n=60
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.evaluation.heads import TABLE, compare
    from eg3d_rlhf.experiments.table import figure_table

    # core/seeds.py reserves these seeds, so that no training uses them
    _reject_seed_of_validation(seed, latent_set)
    seeds = HELD_OUT_RANGES[latent_set].take(n, seed)
    # Each generator is compared with `before` on the same latents.
    metrics_by_network, defective_count = compare(
        dict(zip(network_names(networks), networks, strict=True)), before, seeds
    )
    click.echo("\n".join(figure_table("network", metrics_by_network, TABLE, intervals=("error_reduction",))))
    click.echo(
        f"\n{n} latents ({latent_set}, from {seeds[0]}), psi 1; {defective_count} heads defective before"
        " tuning."
    )
    if out is not None:
        # first and last seed; the seeds are consecutive
        file_content = {
            "held_out": latent_set,
            "seeds": [seeds[0], seeds[-1]],
            "networks": metrics_by_network,
        }
        write_atomic(out, json.dumps(file_content, indent=1).encode())


@click.command("latent-search", cls=GroupedCommand, job="report latent-search")
@shared(
    "network reward-ckpt heldout-reward n seed",
    reward_ckpt={"show_default": "the bundled reward", "help": "Reward by which the heads are improved."},
    heldout_reward={
        "show_default": "the bundled held-out reward",
        "help": "Held-out reward that stops a head with auto.",
    },
    n={
        "metavar": "LATENTS",
        "type": click.IntRange(min=2),
        "default": 64,
        "help": "Number of held-out latents that are improved and compared with their ground-truth heads.",
    },
    seed={
        "default": 0,
        "help": (
            "Number of strides of 1,000,000 by which the held-out latents are shifted; only for"
            " --held-out=latents."
        ),
    },
)
@option(
    "--held-out",
    "latent_set",
    type=click.Choice(list(SEARCH_RANGES)),
    default="latents",
    help="Set of latents that no training uses: latents for tables, validation for choosing settings.",
)
@option(
    "--steps",
    "steps_text",
    metavar="LIST",
    default="5,10,20,40",
    help="Numbers of steps in the table, separated by commas; auto and the gate are added.",
)
@options_from_settings(SearchConfig)
@shared(
    "outdir batch device dry-run",
    outdir={"default": Path("runs/reports/latent-search")},
    batch={"default": 4},
)
def latent_search(
    network: Path | None,
    reward_ckpt: Path | None,
    heldout_reward: Path | None,
    n: int,
    seed: int,
    latent_set: str,
    steps_text: str,
    outdir: Path,
    batch: int,
    device: str,
    dry_run: bool,
    **search_flags,
) -> None:
    """Measure what generator improve does to synthetic heads, by number of steps, with and without the gate.
    The heads are compared with the ground-truth heads of their latents. The same command resumes an
    interrupted report.

    \b
    Example:
        eg3d-rlhf report latent-search --n=4 --steps=1,2
    """
    # An error names the flag, before anything is loaded.
    step_counts = parse_numbers("--steps", steps_text)
    if not step_counts or any(count < 1 or count != int(count) for count in step_counts):
        raise ValueError(
            f"--steps={steps_text}: expected whole numbers of at least 1, separated by commas, such as"
            " 5,10,20,40."
        )
    steps = tuple(sorted({int(count) for count in step_counts}))
    _reject_seed_of_validation(seed, latent_set)
    search_config = SearchConfig(**{name: value for name, value in search_flags.items() if value is not None})
    seeds = SEARCH_RANGES[latent_set].take(n, seed)
    if dry_run:
        print_json(
            {
                "network": str(network or "bundled"),
                "reward_ckpt": str(reward_ckpt or "bundled"),
                "heldout_reward": str(heldout_reward or "bundled"),
                "seeds": [seeds[0], seeds[-1]],
                "n": n,
                "seed": seed,
                "held_out": latent_set,
                "steps": list(steps),
                **{name: getattr(search_config, name) for name in search_flags},
                "outdir": str(outdir),
                "batch": batch,
                "device": device,
            }
        )
        return
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.core import bundled
    from eg3d_rlhf.evaluation import latent_search_report
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.preferences.synthetic import has_ground_truth_heads
    from eg3d_rlhf.rewards.reward import load_reward
    from eg3d_rlhf.tuning.gan.latent_search import check_search

    target_device = choose_device(device)
    with prefix_errors("--network"):
        loaded = load_generator(network, target_device)
        if not has_ground_truth_heads(loaded.generator):
            raise ValueError(
                f"{loaded.path}: the latents of this generator have no ground-truth heads, with which the"
                " report compares. Improve samples with eg3d-rlhf generator improve, and compare them with"
                " people (eg3d-rlhf study)."
            )
    with prefix_errors("--reward-ckpt"):
        reward = load_reward(reward_ckpt, target_device)
    with prefix_errors("--heldout-reward"):
        heldout = load_reward(heldout_reward or bundled.HELDOUT_REWARD, target_device)
    check_search(loaded.generator, search_config, reward, heldout)
    report = latent_search_report.run(
        latent_search_report.SearchStudy(
            loaded=loaded,
            reward=reward,
            heldout_reward=heldout,
            seeds=seeds,
            steps=steps,
            config=search_config,
            batch=batch,
            folder=outdir,
        )
    )
    click.echo("\n".join(latent_search_report.lines(report)))
    click.echo(f"\nWritten to {outdir}: latent-search.json, latents.safetensors, latent-search.png")


@click.command("solid", cls=GroupedCommand, job="report solid")
@argument("networks", check_network, metavar="[FILE|RUN]...", nargs=-1, type=PATH)
@option(
    "--pipeline",
    metavar="toy|DIR",
    check=check_root,
    show_default="none; the runs tuned GANs",
    help="Untuned flow generator that the listed runs tuned: its folder, or toy for the bundled generator.",
)
@option(
    "--conditioning",
    metavar="FILE|DIR",
    type=click.Path(path_type=Path, exists=True),
    show_default="the embeddings of the runs",
    help="Embeddings of the prompts or images for which the flow generator of --pipeline=DIR is sampled.",
)
@name_option(
    "--stage",
    show_default="the first stage",
    help="Name of the stage of the flow generator that was tuned; needs --pipeline.",
)
@shared(
    "before n psi seed out device",
    "level",
    before="Generator before tuning: a network file or a run folder.",
    n={
        "metavar": "SHAPES",
        # best of n is one of the controls: of each CHOOSE untuned shapes, the reward selects one
        "type": click.IntRange(min=CHOOSE),
        "default": 64,
        "help": "Number of shapes, rounded down to a multiple of four.",
    },
    psi={"default": 1.0, "help": "Truncation psi of the samples of GANs; 1 means no truncation."},
    seed="Random seed of the held-out latents of GANs, or of the noises of flow generators.",
    out=TO_JSON,
)
def solid(
    networks: tuple[Path, ...],
    before: Path | None,
    pipeline: str | None,
    conditioning: Path | None,
    stage: str | None,
    n: int,
    psi: float,
    seed: int,
    out: Path | None,
    device: str,
    level: float | None,
) -> None:
    """Test whether generated shapes are physically valid solids. The table shows the terms of the `solid`
    reward before and after tuning, and for comparison the terms of filtered shapes, convex hulls and balls.

    \b
    Examples:
        eg3d-rlhf report solid runs/00000-* --n=16
        eg3d-rlhf report solid --pipeline=toy --n=16
    """
    for flag, flag_value in (("--stage", stage), ("--conditioning", conditioning)):
        if flag_value is not None and pipeline is None:
            raise ValueError(
                f"{flag}={flag_value} has an effect on flow generators only. Add --pipeline, or remove"
                f" {flag}."
            )
    if level is not None and pipeline is not None:
        raise ValueError(
            f"--set level={level:g} has an effect on GANs only, whose shapes are densities. Remove it, or"
            " remove --pipeline."
        )
    # Imported here, so that --help and errors are printed without loading this module.
    from eg3d_rlhf.evaluation.solids import compare_networks, compare_stages, markdown, source_of

    # The names of snapshots are similar in all runs, so a snapshot is named by the folder of its run.
    run_folders = [
        path.parent if path.name.startswith("network-snapshot-") else path
        for path in map(Path.resolve, networks)
    ]
    networks_by_name = dict(zip(network_names(run_folders), networks, strict=True))
    target_device = choose_device(device)
    # Without --pipeline, the networks are GANs with density fields; with it, stages of a flow generator.
    if pipeline is None:
        table_rows, table_facts = compare_networks(
            networks_by_name, before, n, psi, seed, target_device, level
        )
    else:
        # the embeddings of --conditioning, else those that the runs record
        sampling_source = source_of(pipeline, conditioning, run_folders)
        table_rows, table_facts = compare_stages(
            networks_by_name, sampling_source, stage, n, seed, target_device
        )
    click.echo("\n".join(markdown(table_rows, table_facts["rules"])))
    click.echo(
        f"\n{table_facts['what']}. Brackets: 95 % intervals, bootstrap over shapes; for shares Wilson"
        f" intervals. Grids of {table_facts['edge']}^3."
    )
    if out is not None:
        # the file contains the same numbers as the printed table
        file_content = {
            "what": table_facts["what"],
            "weights": table_facts["rules"].weights,
            "lines": table_rows,
        }
        write_atomic(out, json.dumps(file_content, indent=1).encode())
