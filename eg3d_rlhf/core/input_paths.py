"""Checks of the paths of networks, rewards and runs, without an import of torch.

An option or an argument names such a function as its `check` (`eg3d_rlhf.core.cli.option`). The command calls
it before its own function, so that a wrong path is rejected at once. The functions that read the files call
it, too, so that a wrong path has one message.
"""

from pathlib import Path

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.seeds import parse_seeds
from training.input_paths import existing_file, existing_path

KEPT = "network-kept.safetensors"  # file name of the snapshot that early stopping selected
STATE_DICT_SUFFIXES = (".pt", ".pth")  # network files that torch.save wrote
LATENTS_SUFFIX = ".safetensors"  # files of latents
PICKLE_SUFFIX = ".pkl"  # network files of EG3D
# endings of network files that this project can write
NETWORK_SUFFIXES = (".safetensors", *STATE_DICT_SUFFIXES, PICKLE_SUFFIX)


def find_network(source: str | Path | None) -> Path:
    """Return the path of a network file.

    Args: source: path of a network file or a run folder, or None for the bundled generator, see
        `generators.load_generator`. A path that is no folder is returned unchanged.
    Raises: FileNotFoundError if the bundled generator is missing, or a folder contains no snapshot.
    """
    if source is None:
        if not bundled.GENERATOR.exists():
            raise FileNotFoundError(
                f"bundled generator: the file {bundled.GENERATOR} is missing. Restore assets/ from the"
                " repository."
            )
        return bundled.GENERATOR
    source_path = Path(source)
    if source_path.is_dir():
        # The snapshot that early stopping selected is better than the newest one.
        if (source_path / KEPT).is_file():
            return source_path / KEPT
        # Names contain the number of images with leading zeros, so the last name is the newest snapshot.
        # EG3D's own runs contain pickles under the same names.
        snapshots = sorted(source_path.glob("network-snapshot-*.safetensors")) or sorted(
            source_path.glob("network-snapshot-*.pkl")
        )
        checkpoints = sorted(source_path.glob("checkpoint-*.safetensors"))
        if not snapshots and checkpoints:
            # A checkpoint holds the state of the optimizers, too, and is no network file.
            image_count = int(checkpoints[-1].stem.removeprefix("checkpoint-"))
            raise FileNotFoundError(
                f"network: the run {source_path} was stopped at {image_count} images, before it wrote a"
                f" network file. Continue it with train.py --resume={source_path}; its last step writes one."
            )
        if not snapshots:
            raise FileNotFoundError(
                f"network: the folder {source_path} contains no network-snapshot-*.safetensors or .pkl. Pass"
                " a network file, or the folder of another run."
            )
        return snapshots[-1]
    return source_path


def check_network(source: str | Path) -> None:
    """Check that a network file exists, or that a run folder contains one.

    Args: source: path of a network file or a run folder.
    Raises: FileNotFoundError, as the reader of the file.
    """
    network_path = find_network(source)
    # The suffix decides about the reader: torch.save, pickle or safetensors.
    suffix = network_path.suffix.lower()
    if suffix in STATE_DICT_SUFFIXES:
        existing_path(network_path, "network")
    else:
        existing_file(network_path, "network pickle" if suffix == PICKLE_SUFFIX else "network file")


# A folder of a flow generator contains one of these files.
_FLOW_FILES = ("work.json", "pipeline.json", "model_index.json")


def check_latent_network(source: str | Path) -> None:
    """Check that the file or run folder of a generator with latents exists.

    Raises: ValueError if it belongs to a flow generator, which has no latents that could be moved; the errors
        of `check_network`.
    """
    if str(source) == "toy" or any((Path(source) / name).is_file() for name in _FLOW_FILES):
        raise ValueError(
            f"{source} is a flow generator, which has no latents that could be moved. Sample several assets"
            " for each prompt (eg3d-rlhf flow sample), and choose the best of n by a reward (eg3d-rlhf reward"
            " latent) or by the answers of people (eg3d-rlhf flow label)."
        )
    check_network(source)


def check_latents(text: str) -> None:
    """Check a value of --latents: a list of seeds, or the path of an existing file of latents.

    Raises: FileNotFoundError if there is no such file; ValueError for a list that cannot be read.
    """
    if text.endswith(LATENTS_SUFFIX):
        existing_file(text, "file of latents")
    else:
        parse_seeds(text)


def check_latents_file(text: str) -> None:
    """Raise FileNotFoundError if there is no file of latents at a path."""
    existing_file(text, "file of latents")


def check_reward_file(path: str | Path) -> None:
    """Check that a reward file exists.

    Raises: FileNotFoundError if nothing exists at the path; ValueError if it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path}: this is a folder and no reward file. Pass {path / 'reward.safetensors'}, which"
            " tools/train_reward.py writes."
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such reward file. Check the path.")


def check_run_folder(path: str | Path) -> None:
    """Raise ValueError if there is no folder at the path of a run."""
    if not Path(path).is_dir():
        raise ValueError(f"there is no folder at {path}. Pass the folder of a run of train.py.")


def check_torchscript_file(path: str | Path) -> None:
    """Raise ValueError if there is no file of a network that an option names."""
    if not Path(path).is_file():
        raise ValueError(f"the file {path} does not exist. Pass the path of an existing file.")


def check_suffix(out_path: Path) -> None:
    """Raise ValueError unless a path has one of the suffixes in `NETWORK_SUFFIXES`."""
    if out_path.suffix not in NETWORK_SUFFIXES:
        raise ValueError(
            f"--out: expected a file name that ends in {', '.join(NETWORK_SUFFIXES[:-1])} or"
            f" {NETWORK_SUFFIXES[-1]}, got {out_path.name}. Write"
            f" --out={out_path.with_suffix(NETWORK_SUFFIXES[0])}."
        )
