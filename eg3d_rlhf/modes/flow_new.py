"""`eg3d-rlhf flow new`: a folder WORK for a generator and what it is told, on which the five other commands
go on.
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

# files of pictures, and of what may lie beside one under its name
PICTURES = (".png", ".webp")
MAPS = ".npy"
PROMPTS = "prompts.txt"
LONGEST = 2000  # characters of a prompt that the page shows


@click.command("new", cls=GroupedCommand, job="flow new")
@click.argument("folder", metavar="WORK", type=FOLDER)
@option(
    "--pipeline",
    metavar="ROOT",
    required=True,
    help="Folder of a generator that is known (docs/reference/families.md), or toy.",
)
@file_option("--prompts", help="Texts, one per line, for text-conditioned generators; the toy has its own.")
@option(
    "--images",
    metavar="DIR",
    type=FOLDER,
    help="Images with transparent backgrounds, for image-conditioned generators.",
)
@option(
    "--conditioning",
    "embeddings",
    metavar="FILE|DIR",
    type=PATH,
    help="Embeddings made elsewhere, by name, instead of those of the generator's encoder.",
)
@option(
    "--each",
    metavar="N",
    type=click.IntRange(2),
    default=4,
    help="Assets that are drawn per condition, to compare.",
)
@option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where networks run.")
@rare_option(
    "--seed",
    metavar="INT",
    type=click.IntRange(0),
    default=0,
    help="Divides the conditions, plans the pairs.",
)
@rare_option(
    "--split",
    metavar="SHARES",
    default=",".join(f"{share:g}" for share in SHARES),
    help="Of the conditions, to train, to choose and to test on.",
)
@rare_option(
    "--precision", type=click.Choice(list(PRECISIONS)), default="auto", help="Of drawing and training."
)
@rare_option("--batch", metavar="N", type=click.IntRange(1), help="Assets drawn at once, pairs in one pass.")
@rare_option("--up", type=click.Choice(["y", "z"]), default=None, help="Axis of assets that points up.")
def new(
    folder: Path,
    pipeline: str,
    prompts: Path | None,
    images: Path | None,
    embeddings: Path | None,
    device: str,
    **flags,
) -> None:
    """A folder WORK that remembers a generator, its prompts or pictures, and everything after.

    \b
    Example:
        eg3d-rlhf flow new WORK --pipeline=/data/Hunyuan3D-2.1 --images=IMAGES
    """
    from eg3d_rlhf.tuning.flow.base.conditioning import CONDITIONS, read_conditions, write_conditions
    from eg3d_rlhf.tuning.flow.base.problem import chosen_precision
    from training.storage import write_atomic

    check_new(folder)
    family = family_of(Path(pipeline), say=lambda text: None)
    where = choose_device(device)
    for line in examined(family, Path(pipeline)):
        click.echo(line)
    given = None if embeddings is None else read_conditions(embeddings, zero_null=family.zero_null)
    precision = chosen_precision(flags["precision"], where)
    for line in takes(family, Path(pipeline), where, precision, sorted({1, flags["batch"] or family.batch})):
        click.echo(line)
    names = conditions_of(family, prompts, images, given)
    divided = divide(list(names), flags["seed"], shares_of(flags["split"]))
    counts = ", ".join(f"{len(divided[split])} to {split} on" for split in SPLITS)
    for line in rows("prompts" if images is None else "images", [f"{len(names)}: {counts}"]):
        click.echo(line)
    if given is None:
        if images is None:
            assert isinstance(family, EmbedsText)  # or `conditions_of` had raised
            given = family.embed_texts(Path(pipeline), list(names), where)
        else:
            assert isinstance(family, EmbedsImages)
            files = {name: path for name, path in names.items() if path is not None}
            given = family.embed_images(Path(pipeline), files, where)
    if images is None:
        write_atomic(folder / "inputs" / PROMPTS, "".join(f"{name}\n" for name in names).encode())
    else:
        copy_pictures(folder / "inputs", names)
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
    """Shares of the splits. Raises: ValueError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--split: expected shares of {', '.join(SPLITS)}, got {text!r}. Write 0.6,0.2,0.2 or so."
        ) from None


def examined(family: FlowFamily, root: Path) -> Iterator[str]:
    """What the generator's folder is, and what it lacks.

    Raises: ValueError for a folder that cannot be used.
    """
    networks = list(family.networks(root)) if isinstance(family, ListsNetworks) else []
    where = f"Fetch the folder again: {family.address}" if family.address else "Restore the folder."
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
    if not family.bundled:
        listed = ", ".join(path.name for path in papers) or f"none, see {family.address or 'the publisher'}"
        yield from rows("", [f"files of it: {listed}"])
    for network in networks:
        if network.without and not network.found:
            place = f", which {family.address} has" if family.address else ""
            yield from rows(
                "missing", [f"{network.name} in {network.file}{place}: without it no {network.without}"]
            )


def takes(
    family: FlowFamily, root: Path, device: "torch.device", precision: str, batches: Sequence[int]
) -> Iterator[str]:
    """Memory and time of drawing and of an update on this device.

    Raises: ValueError where a stage fits in no way.
    """
    # its networks are small, or a plugin's that does not read meshes
    if family.bundled or not isinstance(family, Encodes):
        return
    from eg3d_rlhf.tuning.flow.training.memory_estimate import LARGE, free_bytes
    from eg3d_rlhf.tuning.flow.workspace.estimate import (  # only here: brings all families
        check_fits,
        estimate,
        table,
    )

    stages = sized_stages(family, root)
    most = max(sum(p.numel() for p in sized.stage.model.parameters()) for sized in stages)
    if most < LARGE:
        yield from rows("memory", [f"no concern: {most:,} parameters at most"])
        return
    found = estimate(stages, precision=precision, batches=batches, device=str(device))
    check_fits(found, free_bytes(device), "flow new")
    yield from (
        f"{'' if number else 'takes':<10}{line}" for number, line in enumerate(table(found).splitlines())
    )


def conditions_of(
    family: FlowFamily, prompts: Path | None, pictures: Path | None, given: "Conditions | None" = None
) -> dict[str, Path | None]:
    """Names of conditions, with the files of pictures.

    Raises: ValueError, FileNotFoundError for what does not fit the generator.
    """
    if given is not None:
        if prompts is not None or pictures is not None:
            raise ValueError(
                "--conditioning: expected no --prompts or --images beside it: embeddings have names. Leave"
                " one out."
            )
        return dict.fromkeys(given.names)
    if prompts is None and pictures is None and family.prompts:
        return dict.fromkeys(family.prompts)
    if (prompts is None) == (pictures is None):
        raise ValueError(
            "new: expected --prompts or --images, got neither or both. Name the conditioning inputs."
        )
    if not isinstance(family, (EmbedsImages, EmbedsText)):
        raise ValueError(
            f"new: expected --conditioning for {family.name}, which has no encoder here. Name a file of"
            " embeddings."
        )
    if pictures is not None:
        if not isinstance(family, EmbedsImages):
            raise ValueError(
                f"--images: expected --prompts for {family.name}, which is text-conditioned. Name a"
                " file of texts."
            )
        return dict(pictures_in(pictures))
    if not isinstance(family, EmbedsText):
        raise ValueError(
            f"--prompts: expected --images for {family.name}, which is image-conditioned. Name their folder."
        )
    assert prompts is not None
    lines = [" ".join(line.split()) for line in prompts.read_text(encoding="utf-8").splitlines()]
    bad = next((line for line in lines if len(line) > LONGEST or not line.isprintable()), None)
    if bad is not None:
        raise ValueError(
            f"--prompts: expected printable lines of up to {LONGEST} characters, got {bad[:40]!r}."
            " Correct it."
        )
    unknown = next((line for line in lines if line and line not in family.prompts), None)
    if family.prompts and unknown is not None:
        known = f"prompts that the {family.name} knows, such as {family.prompts[0]!r}"
        remedy = f"Correct it, or leave --prompts out: the {family.name} has its own {len(family.prompts)}."
        raise ValueError(f"--prompts: expected {known}, got {unknown[:40]!r}. {remedy}")
    return dict.fromkeys(line for line in lines if line)


def pictures_in(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by name.

    Raises: ValueError, FileNotFoundError for none, or for one under two names.
    """
    paths = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in PICTURES]
    if not paths:
        raise FileNotFoundError(
            f"--images: expected pictures ({', '.join(PICTURES)}), got none in {folder}. Name their folder."
        )
    by_name = dict[str, Path]()
    by_content = dict[str, Path]()
    for path in paths:
        for known, key, what in ((by_name, path.stem, "name"), (by_content, file_hash(path), "picture")):
            other = known.setdefault(key, path)
            if other is not path:  # it could be trained on under one name and tested under the other
                raise ValueError(
                    f"--images: expected every {what} once, got {other.name} and {path.name}. Remove one."
                )
    return by_name


def copy_pictures(folder: Path, names: Mapping[str, Path | None]) -> None:
    """Into WORK/inputs, with the maps of points beside them."""
    from eg3d_rlhf.models.policies import link

    for path in names.values():
        assert path is not None
        for source in (path, path.with_suffix(MAPS)):
            if source.is_file():
                link(source, folder / source.name)


def chosen(work: Work, device: "torch.device") -> Iterator[str]:
    """What was chosen, and how to go on."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield from rows("device", [f"{name}, {work.precision}", f"{work.batch} assets at once"])
    count = work.each * len(work.names(*SHOWN))
    yield from rows(
        "to draw",
        [
            f"{count} assets, {work.each} of each condition; {len(work.names(TEST))} conditions are kept for"
            " the test"
        ],
    )
    yield from rows("next", [f"eg3d-rlhf flow sample {work.folder}"])
