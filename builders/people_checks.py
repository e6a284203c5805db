"""Check the backs of a generator of heads against the ground truth: python -m builders.people_checks

The check takes held-out latents whose scan is intact, or damaged ones, on which a tuned generator should
pass, too. At truncation psi 1 and 0.7 it measures the fine relief at the back, where the eyes of the front
are, its correlation with the relief of the front (`eg3d_rlhf.measures.back_relief`), and the F-score of the
back at a quarter voxel (psi 1 only, since truncation changes the latent). A back that repeats the face has
more relief than the ground truth and a correlation above 0.
"""

import json
from pathlib import Path
from typing import Any

import click

from builders.command import dry_run
from eg3d_rlhf.core.cli import ASSETS, GroupedCommand, option
from eg3d_rlhf.core.seeds import BUILDER

BATCH = 4  # shapes at once; bounds the memory
MAX_RELIEF = 1.3  # bound of the relief at the eyes on the back, relative to the ground truth
MAX_CORRELATION = 0.08  # bound of the absolute correlation with the front
INTACT = 0.02  # largest amount of damage of a latent that counts as intact


def select_latents(edition: int, scans: str, count: int) -> Any:
    """Return the first latents of the builder's held-out range whose scans are intact or damaged.

    Args:
        edition: edition of the heads, which determines the damage.
        scans: "intact" or "damaged".
        count: number of latents N.
    Returns: latents [N, 64].
    Raises: ValueError if the range has fewer such latents.
    """
    import torch

    from eg3d_rlhf.generators import latents
    from training.heads.people import normalise_latents
    from training.heads.people_damage import severity
    from training.heads.people_flaws import NAMED, flaw_amounts

    z = torch.from_numpy(normalise_latents(latents(BUILDER.seeds, 64))).float()
    amounts = severity(z[:, NAMED:]) if edition == 3 else flaw_amounts(z).amax(dim=1)
    selected = z[amounts <= INTACT] if scans == "intact" else z[amounts >= 1 - INTACT]
    if len(selected) < count:
        raise ValueError(
            f"--latents: {BUILDER.count} held-out latents have {len(selected)} {scans} scans, but {count}"
            f" were requested. Use at most {len(selected)}."
        )
    return selected[:count]


def check_backs(network: Path, edition: int, scans: str, count: int) -> dict:
    """Measure the backs of a generator's shapes. See the module for the measures.

    Args:
        network: network file.
        edition: edition of the heads.
        scans: "intact" or "damaged", the scans of the latents.
        count: number of latents.
    Returns: settings, ground truth, and the measures at each psi, with `passed` for the bounds at both.
    """
    import numpy as np

    from eg3d_rlhf.generators import camera, load_generator
    from eg3d_rlhf.measures.back_relief import (
        BACK,
        FRONT,
        eye_relief,
        field_depths,
        head_depths,
        relief_correlation_with_front,
    )
    from eg3d_rlhf.measures.people import shape_grids, surfaces
    from training.heads.people import heads_from_latents
    from training.heads.people_mesh import ground_truth_grids
    from training.progress import tqdm

    generator = load_generator(network).generator
    z = select_latents(edition, scans, count)
    values: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    with tqdm(total=count, desc="backs", unit="head") as bar:
        for z_batch in z.split(BATCH):
            heads = heads_from_latents(z_batch)
            for back, front in zip(head_depths(heads, BACK), head_depths(heads, FRONT), strict=True):
                add("truth relief", eye_relief(back))
                add("truth correlation", relief_correlation_with_front(back, front))
            for psi in (1.0, 0.7):
                ws = generator.mapping(
                    z_batch, camera(generator, n=len(z_batch)), truncation_psi=psi, truncation_cutoff=14
                )
                field = generator.field(ws)
                for back, front in zip(field_depths(field, BACK), field_depths(field, FRONT), strict=True):
                    add(f"{psi} relief", eye_relief(back))
                    add(f"{psi} correlation", relief_correlation_with_front(back, front))
                if psi == 1:
                    grids = shape_grids(field)
                    for shape, head in zip(grids, ground_truth_grids(z_batch), strict=True):
                        add("1.0 fine", surfaces(shape, head)["fine"])
            bar.update(len(z_batch))

    def summary(prefix: str) -> dict[str, float]:
        """Return the median relief, the mean correlation, and the number of heads without a relief."""
        relief = np.array(values[f"{prefix} relief"])
        return {
            "relief_at_eyes_voxels": float(np.nanmedian(relief)),
            "correlation_with_front": float(np.nanmean(values[f"{prefix} correlation"])),
            "heads_without_relief": int(np.isnan(relief).sum()),
        }

    truth = summary("truth")
    result: dict[str, Any] = {
        "network": str(network),
        "edition": edition,
        "scans": scans,
        "latents": count,
        "ground_truth": truth,
        "bounds": {"relief_ratio": MAX_RELIEF, "correlation": MAX_CORRELATION},
        "psi": {},
    }
    for psi in (1.0, 0.7):
        measured = summary(str(psi))
        ratio = measured["relief_at_eyes_voxels"] / truth["relief_at_eyes_voxels"]
        passed = ratio <= MAX_RELIEF and abs(measured["correlation_with_front"]) < MAX_CORRELATION
        result["psi"][str(psi)] = {**measured, "relief_ratio": ratio, "passed": bool(passed)}
    result["psi"]["1.0"]["fine_fscore_back"] = float(np.median(values["1.0 fine"]))
    result["passed"] = all(measured["passed"] for measured in result["psi"].values())
    return result


@click.command("python -m builders.people_checks", cls=GroupedCommand)
@option(
    "--network",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=ASSETS / "generator.safetensors",
    show_default="the bundled generator",
    group="Data",
    help="Network file of the generator.",
)
@option(
    "--edition",
    type=click.Choice(["3", "4"]),
    default="4",
    group="Data",
    help="Edition of the heads that the generator was trained on. It determines which latents are intact.",
)
@option(
    "--scans",
    type=click.Choice(["intact", "damaged"]),
    default="intact",
    group="Data",
    help="Kind of scans that the latents have. Only a tuned generator should pass on damaged ones.",
)
@option(
    "--latents",
    metavar="NUM",
    type=click.IntRange(min=1),
    default=100,
    group="Data",
    help="Number of latents.",
)
@option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    show_default="none",
    group="Run",
    help="JSON file of the result, besides the output.",
)
@dry_run
def people_checks(
    network: Path, edition: str, scans: str, latents: int, out: Path | None, dry_run: bool
) -> None:
    """Measure whether the backs of a generator's heads repeat their faces.

    The command prints a JSON object, and ends with exit code 1 if a bound is exceeded.

    \b
    Example:
        python -m builders.people_checks --edition=3 --latents=20
    """
    if dry_run:
        settings = {"network": str(network), "edition": int(edition), "scans": scans, "latents": latents}
        click.echo(json.dumps(settings))
        return
    result = check_backs(network, int(edition), scans, latents)
    text = json.dumps(result, indent=1)
    click.echo(text)
    if out is not None:
        from training.storage import write_atomic

        write_atomic(out, f"{text}\n".encode())
    raise SystemExit(0 if result["passed"] else 1)


if __name__ == "__main__":
    people_checks()
