"""The job `flow new`, which creates a folder WORK for a flow generator and its prompts or images.

The other five commands (sample, label, tune, export, study) work on this folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import GroupedCommand, choose_device, file_hash, option
from eg3d_rlhf.modes.flow_check import faults, licences, rows
from eg3d_rlhf.modes.shared_flags import FOLDER, PATH, file_option, rare_option
from eg3d_rlhf.tuning.flow.base.family import (
    EmbedsImages,
    EmbedsText,
    Encodes,
    FlowFamily,
    ListsNetworks,
    sized_stages,
)
from eg3d_rlhf.tuning.flow.base.settings import PRECISIONS
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import (
    SHARES,
    SHOWN,
    SPLITS,
    TEST,
    Work,
    check_new,
    divide,
    hashes,
)

if TYPE_CHECKING:
    import torch

    from eg3d_rlhf.tuning.flow.base.conditioning import Conditions

# File types of conditioning images, and of the point map that may lie beside an image under the same name.
IMAGE_SUFFIXES = (".png", ".webp")
POINT_MAP_SUFFIX = ".npy"
PROMPTS = "prompts.txt"
MAX_PROMPT_LENGTH = 2000  # characters of a prompt that the page shows


@click.command("new", cls=GroupedCommand, job="flow new")
@click.argument("folder", metavar="WORK", type=FOLDER)
@option(
    "--pipeline",
    metavar="ROOT",
    required=True,
    help="Folder of a supported generator (docs/reference/families.md), or toy for the bundled one.",
)
@file_option(
    "--prompts",
    help="File of prompts, one per line, for text-conditioned generators; the toy has built-in ones.",
)
@option(
    "--images",
    metavar="DIR",
    type=FOLDER,
    help="Folder of images with transparent backgrounds, for image-conditioned generators.",
)
@option(
    "--conditioning",
    "embeddings",
    metavar="FILE|DIR",
    type=PATH,
    help="Precomputed embeddings by name, instead of those of the generator's encoder.",
)
@option(
    "--each",
    metavar="N",
    type=click.IntRange(2),
    default=4,
    help="Number of assets to generate per prompt or image.",
)
@option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Device that runs the networks; auto is CUDA where available.",
)
@rare_option(
    "--seed",
    metavar="INT",
    type=click.IntRange(0),
    default=0,
    help="Random seed of the split of the prompts and of the pairs.",
)
@rare_option(
    "--split",
    metavar="SHARES",
    default=",".join(f"{share:g}" for share in SHARES),
    help="Shares of the prompts for training, for checkpoint selection and for the test.",
)
@rare_option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="auto",
    help="Floating-point precision of sampling and training.",
)
@rare_option(
    "--batch",
    metavar="N",
    type=click.IntRange(1),
    help="Assets generated at once, and pairs per forward pass.",
)
@rare_option("--up", type=click.Choice(["y", "z"]), default=None, help="Axis of the assets that points up.")
def new(
    folder: Path,
    pipeline: str,
    prompts: Path | None,
    images: Path | None,
    embeddings: Path | None,
    device: str,
    **flags,
) -> None:
    """Create a folder WORK that records a generator, its prompts or images, and all later steps.

    \b
    Example:
        eg3d-rlhf flow new WORK --pipeline=/data/Hunyuan3D-2.1 --images=IMAGES
    """
    from eg3d_rlhf.tuning.flow.base.conditioning import CONDITIONS, read_conditions, write_conditions
    from eg3d_rlhf.tuning.flow.base.problem import chosen_precision
    from training.storage import write_atomic

    # Everything is checked and its cost is shown before the first slow step, the embedding of the inputs.
    check_new(folder)
    # the remarks of `family_of` are replaced by the lines of `examined`
    family = family_of(Path(pipeline), say=lambda text: None)
    where = choose_device(device)
    for line in examined(family, Path(pipeline)):
        click.echo(line)
    # zero_null: the family's unconditional embedding is zero, so a file need not contain it
    given = None if embeddings is None else read_conditions(embeddings, zero_null=family.zero_null)
    # auto depends on the device
    precision = chosen_precision(flags["precision"], where)
    for line in takes(family, Path(pipeline), where, precision, sorted({1, flags["batch"] or family.batch})):
        click.echo(line)
    names = conditioning_names(family, prompts, images, given)
    # prompts are split, not pairs, so that no prompt is in two splits
    divided = divide(list(names), flags["seed"], shares_of(flags["split"]))
    counts = ", ".join(f"{len(divided[split])} to {split} on" for split in SPLITS)
    for line in rows("prompts" if images is None else "images", [f"{len(names)}: {counts}"]):
        click.echo(line)
    # no --conditioning: the generator's own encoder computes the embeddings
    if given is None:
        if images is None:
            assert isinstance(family, EmbedsText)  # conditioning_names` raised an error otherwise
            given = family.embed_texts(Path(pipeline), list(names), where)
        else:
            assert isinstance(family, EmbedsImages)
            files = {name: path for name, path in names.items() if path is not None}
            given = family.embed_images(Path(pipeline), files, where)
    if images is None:
        write_atomic(folder / "inputs" / PROMPTS, "".join(f"{name}\n" for name in names).encode())
    else:
        link_images(folder / "inputs", names)
    write_conditions(folder / CONDITIONS, given)
    work = Work(
        folder=folder,
        pipeline=pipeline if family.bundled else str(Path(pipeline).resolve()),
        family=family.name,
        stages=family.stages,
        kind="prompts" if images is None else "pictures",
        up=flags["up"] or family.up,
        splits=divided,
        files=hashes(family.files(Path(pipeline))),
        seed=flags["seed"],
        each=flags["each"],
        precision=precision,
        batch=flags["batch"] or family.batch,
        inputs=(
            {} if images is None else {name: path.name for name, path in names.items() if path is not None}
        ),
    ).write()
    for line in chosen(work, where):
        click.echo(line)


def shares_of(text: str) -> list[float]:
    """Parse the shares of the splits. Raises: ValueError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--split: expected shares for {', '.join(SPLITS)}, such as 0.6,0.2,0.2, got {text!r}."
            " Correct it."
        ) from None


def examined(family: FlowFamily, root: Path) -> Iterator[str]:
    """Describe the generator's folder and what it lacks. Yields lines.

    Raises: ValueError for a folder that cannot be used.
    """
    # a plugin may not list its networks; then nothing is checked here
    networks = list(family.networks(root)) if isinstance(family, ListsNetworks) else []
    where = f"Fetch the folder again: {family.address}" if family.address else "Restore the folder."
    # the first fault is enough to stop; `flow check` lists all
    for problem in (problem for network in networks for problem in faults(network)):
        raise ValueError(f"--pipeline: {problem} {where}")
    yield from rows(
        "generator",
        [f"{family.name} ({family.version or family.layout})", f"stages {', '.join(family.stages)}"],
    )
    papers = licences(root)
    yield from rows(
        "licence", [family.notice or ("this package's" if family.bundled else "see the publisher's")]
    )
    # a downloaded generator has a licence of its own
    if not family.bundled:
        listed = ", ".join(path.name for path in papers) or f"none, see {family.address or 'the publisher'}"
        yield from rows("", [f"files of it: {listed}"])
    for network in networks:
        if network.without and not network.tensors:
            place = f", which {family.address} has" if family.address else ""
            yield from rows(
                "missing", [f"{network.name} in {network.file}{place}: without it no {network.without}"]
            )


def takes(
    family: FlowFamily, root: Path, device: "torch.device", precision: str, batches: Sequence[int]
) -> Iterator[str]:
    """Estimate the memory and time of sampling and of an update on this device. Yields lines.

    Raises: ValueError if a stage does not fit into the device's memory in any configuration.
    """
    # The bundled networks are small; a plugin that does not encode meshes cannot be estimated.
    if family.bundled or not isinstance(family, Encodes):
        return
    from eg3d_rlhf.tuning.flow.training.memory_estimate import LARGE, free_bytes
    from eg3d_rlhf.tuning.flow.workspace.estimate import (  # imported here because it imports all families
        check_fits,
        estimate,
        table,
    )

    stages = sized_stages(family, root)
    # memory is a concern only if the largest stage is large
    most = max(sum(p.numel() for p in sized.stage.model.parameters()) for sized in stages)
    if most < LARGE:
        yield from rows("memory", [f"small networks: at most {most:,} parameters"])
        return
    costs = estimate(stages, precision=precision, batches=batches, device=str(device))
    check_fits(costs, free_bytes(device), "flow new")
    yield from (
        f"{'' if number else 'takes':<10}{line}" for number, line in enumerate(table(costs).splitlines())
    )


def conditioning_names(
    family: FlowFamily, prompts: Path | None, images: Path | None, given: "Conditions | None" = None
) -> dict[str, Path | None]:
    """Return the names of the prompts or images; each image's name maps to its file.

    Raises: ValueError, FileNotFoundError for what does not fit the generator.
    """
    if given is not None:
        if prompts is not None or images is not None:
            raise ValueError(
                "--conditioning cannot be combined with --prompts or --images: the embeddings have"
                " names. Remove"
                " one of them."
            )
        return dict.fromkeys(given.names)
    # the toy: without flags, its built-in prompts
    if prompts is None and images is None and family.prompts:
        return dict.fromkeys(family.prompts)
    if (prompts is None) == (images is None):
        raise ValueError(
            "flow new needs either --prompts or --images, got neither or both. Give one of them."
        )
    # a family without an encoder needs precomputed embeddings
    if not isinstance(family, (EmbedsImages, EmbedsText)):
        raise ValueError(
            f"flow new: {family.name} has no encoder in this package. Give --conditioning=FILE with"
            " precomputed embeddings."
        )
    if images is not None:
        if not isinstance(family, EmbedsImages):
            raise ValueError(
                f"--images: {family.name} is text-conditioned. Give --prompts=FILE, a file of texts."
            )
        return dict(images_in(images))
    if not isinstance(family, EmbedsText):
        raise ValueError(
            f"--prompts: {family.name} is image-conditioned. Give --images=DIR, a folder of images."
        )
    assert prompts is not None
    # runs of spaces and tabs become one space, so that a prompt has one spelling
    lines = [" ".join(line.split()) for line in prompts.read_text(encoding="utf-8").splitlines()]
    bad = next((line for line in lines if len(line) > MAX_PROMPT_LENGTH or not line.isprintable()), None)
    if bad is not None:
        raise ValueError(
            f"--prompts: expected printable lines of up to {MAX_PROMPT_LENGTH} characters, got {bad[:40]!r}."
            " Correct it."
        )
    unknown = next((line for line in lines if line and line not in family.prompts), None)
    if family.prompts and unknown is not None:
        known = f"prompts that the {family.name} was trained on, such as {family.prompts[0]!r}"
        remedy = (
            f"Correct it, or remove --prompts: the {family.name} has {len(family.prompts)} built-in prompts."
        )
        raise ValueError(f"--prompts: expected {known}, got {unknown[:40]!r}. {remedy}")
    return dict.fromkeys(line for line in lines if line)


def images_in(folder: Path) -> dict[str, Path]:
    """List the images of a folder by name (the file name without its suffix).

    Raises: ValueError, FileNotFoundError if there is none, or one image has two names.
    """
    paths = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise FileNotFoundError(
            f"--images: expected images ({', '.join(IMAGE_SUFFIXES)}), got none in {folder}. Name another"
            " folder."
        )
    # by stem: a.png and a.webp would be one name
    by_name = dict[str, Path]()
    by_content = dict[str, Path]()
    for path in paths:
        for known, key, property_name in (
            (by_name, path.stem, "name"),
            (by_content, file_hash(path), "content"),
        ):
            other = known.setdefault(key, path)
            if other is not path:  # a double could be in the training and in the test split
                raise ValueError(
                    f"--images: {other.name} and {path.name} have the same {property_name}. Remove one."
                )
    return by_name


def link_images(folder: Path, names: Mapping[str, Path | None]) -> None:
    """Link the images into WORK/inputs, with the point maps that lie beside them."""
    from eg3d_rlhf.models.policies import link

    for path in names.values():
        assert path is not None
        for source in (path, path.with_suffix(POINT_MAP_SUFFIX)):
            if source.is_file():
                link(source, folder / source.name)


def chosen(work: Work, device: "torch.device") -> Iterator[str]:
    """Describe what was chosen and give the next command. Yields lines."""
    import torch

    # shown, so that a wrong device is noticed before sampling
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield from rows("device", [f"{name}, {work.precision}", f"{work.batch} assets at once"])
    count = work.each * len(work.names(*SHOWN))
    yield from rows(
        "to sample",
        [
            f"{count} assets, {work.each} of each prompt or image; {len(work.names(TEST))} of these are"
            " kept for"
            " the test"
        ],
    )
    yield from rows("next", [f"eg3d-rlhf flow sample {work.folder}"])
