"""The network before tuning, which runs of train.py record.

A report that compares a tuned network with the network before tuning needs both. If the user names only the
run, the network before tuning is the one from which this run began, and not the bundled generator.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.experiments.run import recorded
from eg3d_rlhf.generators import find_network, load_generator
from eg3d_rlhf.generators.stored_latents import KIND as LATENTS
from eg3d_rlhf.generators.stored_latents import LatentsFile
from training.networks import state_hash
from training.steering import ATTRIBUTE, detach
from training.storage import kind_of, read_meta


def network_before(networks: Iterable[Path], flag: str = "--before") -> Path:
    """Return the file of the network from which tuned networks began.

    Args:
        networks: tuned networks, as files or run folders. A file belongs to the run in its folder.
        flag: flag that names the network before tuning, for messages.
    Returns: the recorded file, or the bundled generator if no run records its beginning, for example because
        a network lies outside a run folder. For a file of latents it is their generator; for a network that
        was steered outside a run, it is the network without steering.
    Raises: ValueError that names `flag` if a recorded file was moved or changed, if a run began from
        untrained networks, if the runs began from different networks, or if a steered network differs from
        the bundled one by more than its steering.
    """
    run_by_file: dict[Path, Path] = {}
    for network in networks:
        run_folder = network if network.is_dir() else network.parent
        before_path = _recorded_beginning(run_folder, recorded(run_folder), flag)
        if before_path is None and network.is_file():
            before_path = _beginning_of_file(network, flag)
        if before_path is not None:
            run_by_file.setdefault(before_path, run_folder)
    if len(run_by_file) > 1:
        beginnings = " and ".join(f"{run} from {before_path}" for before_path, run in run_by_file.items())
        raise ValueError(
            f"{flag} is missing, and the runs began from different networks: {beginnings}. Pass the network"
            f" with which all are compared with {flag}=FILE, or compare the runs one by one."
        )
    return next(iter(run_by_file), None) or find_network(None)


def _beginning_of_file(path: Path, flag: str) -> Path | None:
    """Return the network of a file of latents, or the one that was steered; None for other network files.

    Args:
        path: network file, or file of latents, outside a run folder.
        flag: see `network_before`.
    """
    if path.suffix != ".safetensors":
        return None
    kind = kind_of(path)
    if kind == LATENTS:
        return find_network(LatentsFile.load(path).network or None)
    # The header suffices to see that a network is not steered, which most are not.
    if kind != "network" or ATTRIBUTE not in read_meta(path):
        return None
    steered = load_generator(path)
    for network in (steered.nets.G, steered.nets.G_ema):
        if network is not None:
            detach(network)
    # Equal weights, and not an equal file: writing the steered file wrote the weights anew.
    if state_hash(steered.nets.G_ema) == load_generator(None).hash:
        return find_network(None)
    raise ValueError(
        f"{flag} is missing, and {path} is a steered network whose weights are not those of the bundled"
        f" generator. Pass the network that was steered with {flag}=FILE."
    )


def _recorded_beginning(run_folder: Path, record: dict[str, Any], flag: str) -> Path | None:
    """Return the file from which a run began; None if its record does not name one.

    Args:
        run_folder: folder of the run.
        record: settings that the run recorded.
        flag: see `network_before`.
    """
    hashes = record.get("hashes", {})
    # A round of labelling continues from the network of the last round; its reference is the untuned network.
    role = "reference" if record.get("reference") is not None else "init"
    recorded_path = record.get(role)
    recorded_hash = hashes.get(role)
    if recorded_path is None and recorded_hash is None:
        return None
    if recorded_path == "scratch":
        raise ValueError(
            f"{flag} is missing, and the run {run_folder} began from untrained networks. Pass the network"
            f" with which it is compared with {flag}=FILE."
        )
    bundled_path = find_network(None)
    if recorded_hash == file_hash(bundled_path) or (recorded_path == "bundled" and recorded_hash is None):
        return bundled_path
    network_path = bundled.GENERATOR if recorded_path == "bundled" else Path(recorded_path or "")
    # The path may hold another file by now: its hash decides.
    if network_path.is_file() and recorded_hash in (None, file_hash(network_path)):
        return network_path
    stated_hash = "" if recorded_hash is None else f" (SHA-256 {recorded_hash[:12]}...)"
    raise ValueError(
        f"{flag} is missing, and {recorded_path or 'no recorded file'} does not hold the network from which"
        f" the run {run_folder} began{stated_hash}. Pass that network with {flag}=FILE."
    )
