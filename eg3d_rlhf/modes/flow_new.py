"""The job `flow new`, which creates a folder WORK for a flow generator and its prompts or images.

The other five commands (`flow sample`, `label`, `tune`, `export` and `study`) read and extend this folder.
The docstring of eg3d_rlhf/tuning/flow/workspace/work_folder.py lists its files.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eg3d_rlhf.core.cli import (
    GroupedCommand,
    argument,
    choose_device,
    file_hash,
    option,
    prefix_errors,
)
from eg3d_rlhf.core.device_option import DEVICE
from eg3d_rlhf.modes.flow_check import (
    describe_missing,
    entry_lines,
    find_address,
    find_faults,
    find_licences,
)
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
from eg3d_rlhf.tuning.flow.families import check_root, family_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import (
    SHARES,
    SHOWN,
    SPLITS,
    TEST,
    Work,
    check_new,
    describe_splits,
    divide,
    hashes,
)
from training.input_paths import existing_file
from training.text_files import read_text

if TYPE_CHECKING:
    import torch

    from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
    from eg3d_rlhf.tuning.flow.workspace.estimate import Row

# File types that have no alpha channel, so their images cannot have a transparent background.
OPAQUE_SUFFIXES = (".jpg", ".jpeg", ".jfif")
POINT_MAP_SUFFIX = ".npy"  # of the point map that may lie beside an image under the same name
PROMPTS = "prompts.txt"
MAX_PROMPT_LENGTH = 2000  # characters of a prompt that the page shows


def check_prompt_file(path: Path) -> None:
    """Raise FileNotFoundError if --prompts names no file."""
    existing_file(path, "text file with one prompt per line")


def check_image_folder(path: Path) -> None:
    """Raise FileNotFoundError if --images names no folder."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}. Pass the path of a folder of images.")


def check_embeddings(path: Path) -> None:
    """Raise FileNotFoundError if --conditioning names neither a file nor a folder."""
    if not path.exists():
        raise FileNotFoundError(f"there is neither a file nor a folder {path}. Correct the path.")


@click.command("new", cls=GroupedCommand, job="flow new")
@argument("folder", check_new, metavar="WORK", type=FOLDER)
@option(
    # The generator, and the inputs on which it is conditioned.
    "--pipeline",
    check=check_root,
    metavar="ROOT",
    required=True,
    help=(
        "Folder of a supported flow generator (docs/reference/families.md), or the word toy for the bundled"
        " toy generator."
    ),
)
@file_option(
    "--prompts",
    check=check_prompt_file,
    show_default="the built-in prompts, for the toy",
    help="Text file with one prompt per line, for generators that are conditioned on text.",
)
@option(
    "--images",
    metavar="DIR",
    check=check_image_folder,
    type=FOLDER,
    help="Folder of images with transparent backgrounds, for generators that are conditioned on images.",
)
@option(
    "--conditioning",
    "embeddings",
    metavar="FILE|DIR",
    check=check_embeddings,
    type=PATH,
    show_default="computed with the generator's encoder",
    help=(
        "File or folder of precomputed embeddings of the prompts or images and their names; it replaces"
        " --prompts and --images."
    ),
)
@option(
    # Number of samples, and the device that computes the embeddings.
    "--each",
    metavar="N",
    type=click.IntRange(2),
    default=4,
    help="Number of assets to generate per prompt or image; people compare assets of the same prompt.",
)
@option(
    "--device",
    type=DEVICE,
    default="auto",
    help="Device that runs the networks; auto selects CUDA if it is available.",
)
@rare_option(
    "--seed",
    metavar="INT",
    type=click.IntRange(0),
    default=0,
    help="Random seed with which the prompts are split and the pairs for labelling are chosen.",
)
@rare_option(
    "--split",
    metavar="SHARES",
    default=",".join(f"{share:g}" for share in SHARES),
    help=(
        "Shares of the prompts that are used for training, for checkpoint selection with the held-out pairs,"
        " and for the study; they add up to 1."
    ),
)
@rare_option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    default="auto",
    help=(
        "Floating-point precision of sampling and training; auto selects bfloat16 on CUDA and float32 on a"
        " CPU."
    ),
)
@rare_option(
    "--batch",
    metavar="N",
    type=click.IntRange(1),
    show_default="by generator",
    help=(
        "Number of assets that are generated at once, and of pairs in one forward pass of the training. A"
        " smaller number needs less memory."
    ),
)
@rare_option(
    "--up",
    type=click.Choice(["y", "z"]),
    default=None,
    show_default="by generator",
    help="Coordinate axis that points up in the generated assets.",
)
def new(
    folder: Path,
    pipeline: str,
    prompts: Path | None,
    images: Path | None,
    embeddings: Path | None,
    device: str,
    **flags,
) -> None:
    """Create a folder WORK for tuning a flow generator. It stores the settings, the prompts or images and
    their embeddings; later commands add generated assets, answers of people and tuned networks.

    \b
    Example:
        eg3d-rlhf flow new WORK --pipeline=/data/Hunyuan3D-2.1 --images=IMAGES
    """
    # Raises ValueError for text that is no list of shares, before the slow steps.
    shares = parse_shares(flags["split"])
    # Imported here, so that --help and errors are printed without loading these modules.
    from eg3d_rlhf.tuning.flow.base.conditioning import (
        CONDITIONING_FILE,
        read_conditioning,
        write_conditioning,
    )
    from eg3d_rlhf.tuning.flow.base.problem import chosen_precision
    from training.storage import write_atomic

    # Everything is checked, and the cost is shown, before the first slow step: the embedding of the inputs.
    # `print_line` ignores the notice about the licence, because `check_and_describe` prints it.
    family = family_of(Path(pipeline), print_line=lambda text: None)
    target_device = choose_device(device)
    for line in check_and_describe(family, Path(pipeline), embeds=embeddings is None):
        click.echo(line)
    # zero_null: the family's unconditional embedding is zero, so a file need not contain it
    embeddings_by_name = (
        None if embeddings is None else read_conditioning(embeddings, zero_null=family.zero_null)
    )
    precision = chosen_precision(flags["precision"], target_device)
    for line in cost_lines(
        family, Path(pipeline), target_device, precision, sorted({1, flags["batch"] or family.batch})
    ):
        click.echo(line)
    paths_by_name = conditioning_names(family, prompts, images, embeddings_by_name)
    if images is not None:
        paths_by_name, image_notes = usable_images(images, paths_by_name)
        for note in image_notes:
            for line in entry_lines("left out", [note]):
                click.echo(line)
    # Prompts are split, not pairs, so that no prompt is in two splits.
    prompts_by_split = divide(list(paths_by_name), flags["seed"], shares)
    for line in entry_lines(
        "prompts" if images is None else "images",
        [f"{len(paths_by_name)}: {describe_splits(prompts_by_split)}"],
    ):
        click.echo(line)
    # no --conditioning: the generator's own encoder computes the embeddings
    if embeddings_by_name is None:
        if images is None:
            # `conditioning_names` has raised ValueError for a family without an encoder
            assert isinstance(family, EmbedsText)
            embeddings_by_name = family.embed_texts(Path(pipeline), list(paths_by_name), target_device)
        else:
            assert isinstance(family, EmbedsImages)
            image_paths = {name: path for name, path in paths_by_name.items() if path is not None}
            embeddings_by_name = family.embed_images(Path(pipeline), image_paths, target_device)
    if images is None:
        write_atomic(folder / "inputs" / PROMPTS, "".join(f"{name}\n" for name in paths_by_name).encode())
    else:
        link_images(folder / "inputs", paths_by_name)
    # Written before work.json, whose presence marks a complete folder.
    write_conditioning(folder / CONDITIONING_FILE, embeddings_by_name)
    work = Work(
        # The path is absolute, so that later commands can run in any folder. A bundled generator has a name
        # instead.
        folder=folder,
        pipeline=pipeline if family.bundled else str(Path(pipeline).resolve()),
        family=family.name,
        stages=family.stages_in(Path(pipeline)),
        kind="prompts" if images is None else "pictures",
        up=flags["up"] or family.up,
        splits=prompts_by_split,
        # later commands reject a generator whose files have changed
        files=hashes(family.files(Path(pipeline))),
        seed=flags["seed"],
        each=flags["each"],
        precision=precision,
        batch=flags["batch"] or family.batch,
        inputs=(
            {}
            if images is None
            else {name: path.name for name, path in paths_by_name.items() if path is not None}
        ),
    ).write()
    for line in choice_lines(work, target_device):
        click.echo(line)


def parse_shares(shares_text: str) -> list[float]:
    """Parse the value of --split, numbers separated by commas. Raises: ValueError for other text."""
    try:
        # `divide` checks the number of shares and their sum
        return [float(share) for share in shares_text.split(",")]
    except ValueError:
        raise ValueError(
            f"--split: {shares_text!r} is not a list of numbers. Write one share for each of"
            f" {', '.join(SPLITS)}, separated by commas, such as 0.6,0.2,0.2."
        ) from None


def check_and_describe(family: FlowFamily, root: Path, embeds: bool = True) -> Iterator[str]:
    """Check the generator's folder, and yield lines that describe it, its licence and missing networks.

    Args:
        family: family of the generator.
        root: folder of the generator.
        embeds: True if the generator's own encoder has to embed prompts or images.

    Raises: ValueError for a folder that cannot be used.
    """
    # The family of a plugin may not list its networks. Then nothing is checked here. An encoder that is not
    # used may be missing or faulty.
    networks = [
        network
        for network in (family.networks(root) if isinstance(family, ListsNetworks) else ())
        if embeds or not network.embeds
    ]
    # The first fault ends the command; `flow check` lists all faults. Values are read, too, because later
    # commands would reject values that are not finite, after the inputs were embedded.
    for network in networks:
        if network.missing:
            raise ValueError(f"--pipeline: {network.missing}")
        for fault in find_faults(network, deep=True):
            address = find_address(network, family)
            remedy = (
                f"It is published at {address}."
                if address
                else "Copy the generator's folder again from its source."
            )
            raise ValueError(f"--pipeline: {fault} {remedy}")
    stage_names = ", ".join(family.stages_in(root))
    yield from entry_lines(
        "generator",
        [f"{family.name} ({family.version or family.layout})", f"stages {stage_names}"],
    )
    licence_files = find_licences(root)
    yield from entry_lines(
        "licence",
        [
            family.notice
            or ("the licence of this package" if family.bundled else "see the licence of the publisher")
        ],
    )
    # The bundled generator has the licence of this package; a downloaded generator has its own licence.
    if not family.bundled:
        licence_names = (
            ", ".join(path.name for path in licence_files) or f"none, see {family.address or 'the publisher'}"
        )
        yield from entry_lines("", [f"licence files: {licence_names}"])
    for network in networks:
        if network.without and not network.tensors:
            yield from entry_lines("missing", [f"{describe_missing(network, family)} ({network.file})"])


def cost_lines(
    family: FlowFamily, root: Path, device: "torch.device", precision: str, batches: Sequence[int]
) -> Iterator[str]:
    """Estimate the memory and the time of sampling and of one training update, and yield lines of a table.

    No line is yielded for a bundled generator, and for a plugin whose family does not encode assets.

    Args:
        family: family of the generator.
        root: folder of the generator.
        device: device that will run the networks.
        precision: floating-point precision, "bfloat16" or "float32".
        batches: batch sizes to estimate.

    Raises: ValueError if a stage does not fit into the device's memory in any configuration.
    """
    # The bundled networks are small; a plugin that does not encode meshes cannot be estimated.
    if family.bundled or not isinstance(family, Encodes):
        return
    # imported here, because --help must not load these modules
    from eg3d_rlhf.tuning.flow.training.memory_estimate import LARGE, free_bytes

    # imported here because it imports all families
    from eg3d_rlhf.tuning.flow.workspace.estimate import check_fits, rows_of, speed, table, trace_costs

    stages = sized_stages(family, root)
    # A small generator fits into every memory, so the slow estimate is left out.
    max_parameter_count = max(
        sum(parameter.numel() for parameter in sized_stage.stage.model.parameters()) for sized_stage in stages
    )
    if max_parameter_count < LARGE:
        yield from entry_lines("memory", [f"small networks: at most {max_parameter_count:,} parameters"])
        return
    # The memory is computed with fake tensors, so that nothing large is allocated.
    costs = trace_costs(stages, precision=precision, several=max(batches) > 1, device=device.type)
    operations_per_second = speed(str(device), precision)
    # `flow sample` holds the weights in the data type of the passes, and `flow tune` in float32 or in that
    # of --dtype.
    rows = [
        row
        for dtype in dict.fromkeys(("float32", precision))
        for row in rows_of(costs, dtype=dtype, batches=batches, operations_per_second=operations_per_second)
        if row.what != "sample" or dtype == precision
    ]
    # raises ValueError with a remedy
    check_fits(rows, free_bytes(device), "flow new")
    # the first ten columns hold the title, as in `entry_lines`
    yield from (
        f"{'' if line_index else 'takes':<10}{line}"
        for line_index, line in enumerate(table(rows).splitlines())
    )
    stages_for_bfloat16 = find_bfloat16_stages(rows, free_bytes(device))
    if stages_for_bfloat16:
        yield from entry_lines(
            "", [f"{', '.join(stages_for_bfloat16)}: to fit, needs eg3d-rlhf flow tune WORK --dtype=bfloat16"]
        )


def find_bfloat16_stages(rows: Sequence["Row"], available_bytes: int) -> list[str]:
    """Return the stages whose update fits into a device only with weights in bfloat16.

    Args:
        rows: estimates for all stages.
        available_bytes: free memory of the device in bytes.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.tuning.flow.training.memory_estimate import SHARE

    updates = [row for row in rows if row.what != "sample"]
    return [
        stage
        for stage in dict.fromkeys(row.stage for row in updates)
        if min(row.bytes for row in updates if row.stage == stage and row.dtype == "float32")
        > SHARE * available_bytes
    ]


def conditioning_names(
    family: FlowFamily,
    prompts: Path | None,
    images: Path | None,
    embeddings_by_name: "Conditioning | None" = None,
) -> dict[str, Path | None]:
    """Return the names of the prompts or images on which the generator is conditioned, with the image files.

    Args:
        family: family of the generator.
        prompts: file of --prompts, with one prompt per line, or None.
        images: folder of --images, or None.
        embeddings_by_name: embeddings of --conditioning, whose names are used, or None.

    Returns: a mapping whose keys are the names. The value is the file of an image, and None for a prompt and
        for a precomputed embedding.

    Raises: ValueError if the flags exclude each other or do not suit the generator, and for unsuitable
        prompts or images; FileNotFoundError for a folder without images.
    """
    if embeddings_by_name is not None:
        if prompts is not None or images is not None:
            raise ValueError(
                "--conditioning cannot be combined with --prompts or --images, because its embeddings have"
                " names already. Remove one of the flags."
            )
        # the embeddings replace both prompts and images
        return dict.fromkeys(embeddings_by_name.names)
    # The toy has built-in prompts, which are used if no prompts are given.
    # family.prompts is empty for generators that are not bundled
    if prompts is None and images is None and family.prompts:
        return dict.fromkeys(family.prompts)
    if prompts is None and images is None:
        raise ValueError(
            "flow new: the inputs of the generator are missing. Add --prompts=FILE for a generator that is"
            " conditioned on text, or --images=DIR for one that is conditioned on images."
        )
    if prompts is not None and images is not None:
        raise ValueError("--prompts cannot be combined with --images. Remove one of them.")
    # a family without an encoder needs precomputed embeddings
    if not isinstance(family, (EmbedsImages, EmbedsText)):
        raise ValueError(
            f"flow new: this package has no encoder for {family.name}, so it cannot embed prompts or images."
            " Replace --prompts or --images by --conditioning=FILE with precomputed embeddings."
        )
    if images is not None:
        if not isinstance(family, EmbedsImages):
            raise ValueError(
                f"--images: {family.name} is conditioned on text. Replace --images by --prompts=FILE, a file"
                " with one prompt per line."
            )
        return dict(list_images(images))
    if not isinstance(family, EmbedsText):
        raise ValueError(
            f"--prompts: {family.name} is conditioned on images. Replace --prompts by --images=DIR, a folder"
            " of images."
        )
    assert prompts is not None
    with prefix_errors("--prompts"):
        # Several spaces or tabs in a row become one space, so that a prompt has only one spelling.
        prompt_texts = [" ".join(text_line.split()) for text_line in read_text(prompts).splitlines()]
    if not any(prompt_texts):
        raise ValueError(f"--prompts: the file {prompts} has no prompt. Write one prompt per line into it.")
    invalid_prompt = next(
        (
            text_line
            for text_line in prompt_texts
            if len(text_line) > MAX_PROMPT_LENGTH or not text_line.isprintable()
        ),
        None,
    )
    if invalid_prompt is not None:
        raise ValueError(
            f"--prompts: the line {invalid_prompt[:40]!r} is longer than {MAX_PROMPT_LENGTH} characters or"
            " contains characters that cannot be printed. Shorten the line, or remove these characters."
        )
    unknown_prompt = next(
        (text_line for text_line in prompt_texts if text_line and text_line not in family.prompts), None
    )
    if family.prompts and unknown_prompt is not None:
        raise ValueError(
            f"--prompts: the {family.name} was not trained on the prompt {unknown_prompt[:40]!r}. Use prompts"
            f" such as {family.prompts[0]!r}, or remove --prompts to use all {len(family.prompts)} built-in"
            " prompts."
        )
    # without empty lines and without repetitions
    return dict.fromkeys(text_line for text_line in prompt_texts if text_line)


def list_images(folder: Path) -> dict[str, Path]:
    """List the images of a folder: a mapping from the file's name without its suffix to the file.

    Raises: FileNotFoundError for a folder without images; ValueError that lists all images that have the same
        name or the same content as another one.
    """
    from training.image_reading import joined_errors  # imported here, because --help must not load PIL

    file_names, skipped_images = file_names_in(folder)
    if not file_names:
        raise FileNotFoundError(
            f"--images: no image with a transparent background was found in {folder}. Name a folder with"
            f" images such as .png or .webp. {' '.join(skipped_images)}".rstrip()
        )
    # a.png and a.webp would have the same name, so both are looked up before the result is built.
    paths_by_name = dict[str, Path]()
    paths_by_content = dict[str, Path]()
    repetitions = []
    for path in (folder / file_name for file_name in file_names):
        # An image that occurs twice could be in the training split and in the test split.
        for earlier_paths, path_key, property_name in (
            (paths_by_name, path.stem, "name"),
            (paths_by_content, file_hash(path), "content"),
        ):
            # `setdefault` stores this path, or returns the earlier path with the same key.
            earlier_path = earlier_paths.setdefault(path_key, path)
            if earlier_path is not path:
                repetitions.append(f"{earlier_path.name} and {path.name} have the same {property_name}.")
    if repetitions:
        raise ValueError(f"--images: {joined_errors(repetitions)} Remove one of each two files.")
    return paths_by_name


def file_names_in(folder: Path) -> tuple[list[str], list[str]]:
    """List the files of a folder whose images may have a transparent background.

    Returns: the sorted names of these files, and lines that describe the other files, with their number and a
        remedy for each kind.
    """
    # imported here, because --help must not load this module
    from training.image_reading import name_list, skipped_lines, split_names

    paths = list(folder.iterdir())
    image_names, skipped_names = split_names(path.name for path in paths if path.is_file())
    opaque_names = [name for name in image_names if name.lower().endswith(OPAQUE_SUFFIXES)]
    lines = skipped_lines(skipped_names)
    if opaque_names:
        lines.append(
            f"Skipped JPEG images, which cannot have a transparent background ({len(opaque_names)}):"
            f" {name_list(opaque_names)}. Remove their backgrounds, and save them as PNG."
        )
    nested_images, _ = split_names(
        file_path.relative_to(folder).as_posix()
        for path in paths
        if path.is_dir()
        for file_path in path.rglob("*")
    )
    if nested_images:
        lines.append(
            f"Skipped images in subfolders ({len(nested_images)}): {name_list(nested_images)}. Move them into"
            f" {folder} itself."
        )
    return [name for name in image_names if name not in opaque_names], lines


def usable_images(
    folder: Path, paths_by_name: Mapping[str, Path | None]
) -> tuple[dict[str, Path | None], list[str]]:
    """Check all images before the first one is embedded.

    Args:
        folder: folder of --images.
        paths_by_name: image files by name.

    Returns: the images that can be used, and lines that describe all files that are left out.

    Raises: ValueError that lists all images that are damaged or opaque, or if no image can be used.
    """
    # imported here, because --help must not load these modules
    from eg3d_rlhf.models.image_preprocessing import usable_cut_outs
    from training.image_reading import joined_errors, left_out_lines
    from training.progress import tqdm

    image_paths = [path for path in paths_by_name.values() if path is not None]
    with prefix_errors("--images"):
        usable_paths, unusable_images = usable_cut_outs(tqdm(image_paths, desc="checking", unit="image"))
        if not usable_paths:
            raise ValueError(joined_errors(unusable_images))
    kept_paths = set(usable_paths)
    return (
        {name: path for name, path in paths_by_name.items() if path in kept_paths},
        [*file_names_in(folder)[1], *left_out_lines(unusable_images)],
    )


def link_images(folder: Path, paths_by_name: Mapping[str, Path | None]) -> None:
    """Create links to the images in the folder WORK/inputs.

    A point map is linked, too, if it lies beside an image and has the same name with the suffix .npy.

    Args:
        folder: folder WORK/inputs.
        paths_by_name: image files by name.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.models.policies import link

    # Point maps are optional, so only existing files are linked.
    for path in paths_by_name.values():
        assert path is not None
        for linked_path in (path, path.with_suffix(POINT_MAP_SUFFIX)):
            if linked_path.is_file():
                link(linked_path, folder / linked_path.name)


def choice_lines(work: Work, device: "torch.device") -> Iterator[str]:
    """Yield lines that show the device, the precision, the number of assets, and the next command.

    Args:
        work: the new folder WORK.
        device: device that will generate the assets.
    """
    # imported here, because --help must not load these modules
    import torch

    from eg3d_rlhf.modes.flow_next import flow_command
    from eg3d_rlhf.tuning.flow.workspace.plan import make_plan

    # The device is printed so that a wrong choice is noticed before sampling.
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    yield from entry_lines(
        "device", [f"{device_name}, {work.precision}", f"{work.batch} asset{'s' * (work.batch > 1)} at once"]
    )
    asset_count = work.each * len(work.names(*SHOWN))
    yield from entry_lines(
        "to sample",
        [
            f"{asset_count} assets, {work.each} of each prompt or image; {len(work.names(TEST))} further"
            " prompts or images are kept for the study"
        ],
    )
    plan = make_plan(work)
    if not plan.shows_something:
        yield from entry_lines(
            "warning",
            [
                f"{len(work.names())} {work.kind_word} with {work.each} assets each are too few to show a"
                " learnable signal, however many pairs are labelled. flow plan states how many are enough"
            ],
        )
    yield f"next: {flow_command('plan', work.folder)}"
