"""The job `reward crop`: draws which part of a generator's shapes a reward reads."""

from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, option, prefix_errors
from eg3d_rlhf.core.input_paths import check_reward_file
from eg3d_rlhf.modes.shared_flags import PATH, shared


@click.command("crop", cls=GroupedCommand, job="reward crop")
@option(
    "--reward",
    check=check_reward_file,
    metavar="FILE",
    type=PATH,
    group="What",
    show_default="none; the crop that reward train chooses for the generator is drawn",
    help="Reward file whose crop of the density grid is drawn.",
)
@option(
    "--crop",
    metavar="X X Y Y Z Z",
    type=click.FloatRange(0, 0.9),
    nargs=6,
    default=None,
    group="What",
    show_default="by the generator",
    help="Shares of the cube's edge that are cropped at its six faces, as of reward train.",
)
@option(
    "--level",
    type=float,
    group="What",
    rare=True,
    show_default="stored in the generator",
    help="Raw density sigma_raw at the surface, where the crop is measured.",
)
@shared("network psi outdir device", psi={"default": 1.0}, outdir={"default": Path("runs/crop")})
def crop_command(reward, crop, level, network, psi, outdir, device) -> None:
    """Draw which part of a generator's shapes a reward reads: the box of its density grid in the cube, and
    the surface of eight samples inside and outside of it, from the front, from the side and from above.

    The folder of --outdir receives crop.png, and its numbers as crop.json. The crop is the one of a reward's
    file (--reward), the one of --crop, or else the one that `reward train` chooses for the generator.

    \\b
    Example:
        eg3d-rlhf reward crop --outdir=runs/example/crop
    """
    # Imported here, so that --help is printed without loading these modules.
    from eg3d_rlhf.core.spec import SlabSpec
    from eg3d_rlhf.generators import load_generator
    from eg3d_rlhf.generators.density_samples import LEVEL_REMEDY, RESOLUTION, check_density, sample_density
    from eg3d_rlhf.rewards import crop_report
    from eg3d_rlhf.rewards.reward import check_reward, load_reward
    from eg3d_rlhf.rewards.slab_crops import choose_crop
    from training.progress import working

    if reward is not None and crop is not None:
        raise ValueError(
            "--reward and --crop cannot be combined, because each of them decides the crop. Keep one of them."
        )
    if reward is not None:
        with prefix_errors("--reward"):
            loaded_reward = load_reward(reward)
        # the level of the shapes that were labelled
        level = loaded_reward.provenance.get("level") if level is None else level
    with prefix_errors("--network"):
        generator = load_generator(network, choose_device(device), level).generator
        samples = sample_density(generator, psi=psi)
    if reward is not None:
        with prefix_errors("--reward"):
            check_reward(loaded_reward, generator, str(reward))
            spec = getattr(loaded_reward.observation, "spec", None)
            if not isinstance(spec, SlabSpec):
                raise ValueError(
                    f"{reward} reads {loaded_reward.observation.kind}, which is no grid of densities, so it"
                    " has no crop. Name a reward of the kind sigma or points."
                )
        reason = f"crop of the density grid: that of {reward}"
    elif crop is not None:
        spec = SlabSpec.from_bounds(generator.bounds, RESOLUTION, crop=tuple(crop))
        reason = "crop of the density grid: that of --crop"
    else:
        choice = choose_crop([generator], level=level)
        if level is not None and choice.level != level:
            raise ValueError(
                f"--set level={level:g}: none of eight samples has a surface at this level. Pass --set"
                f" level={choice.level or 0:g}, or leave it out."
            )
        spec = SlabSpec.from_bounds(generator.bounds, RESOLUTION, crop=choice.crop)
        reason = choice.line()
    with working("densities and figure of the crop"):
        report = crop_report.compute(generator, spec, samples)
        outdir.mkdir(parents=True, exist_ok=True)
        written_paths = crop_report.write(report, outdir)
    check = check_density(generator, psi=psi)
    problem = check.problem(LEVEL_REMEDY)
    click.echo(f"{check.line()[:1].upper()}{check.line()[1:]}.")
    if problem is not None:
        click.echo(f"Warning: --network: {problem}", err=True)
    click.echo(f"{reason[:1].upper()}{reason[1:]}.")
    click.echo(crop_report.summary(report))
    click.echo("\n".join(str(path) for path in written_paths))
