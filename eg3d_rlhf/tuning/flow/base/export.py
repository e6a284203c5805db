"""Export of a generator as a folder in its published layout, with tuned networks.

The generator's family describes the files of the folder (`Release`). This module merges adapters into the
weights, rounds the weights to the data types of the original files, and links or writes all files.
"""

import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from eg3d_rlhf.models.lora import adapted_layers, merge_rounding, merged_state
from eg3d_rlhf.models.policies import link, tuned_model
from eg3d_rlhf.tuning.flow.base.family import Exports, FlowFamily, check_stages
from training.progress import tqdm
from training.storage import write_atomic

# Line of a training that ends without a table of win rates.
NO_TABLE = (
    "There is no table of win rates, because nothing evaluates finished assets of this generator. To compare"
    " the result with the untuned generator, let people compare samples of both."
)


def export_command(folder: Path) -> str:
    """Return the command that exports the tuned stages of a run folder."""
    return f"eg3d-rlhf flow export {shlex.quote(str(folder))} --outdir=TUNED"


def export(
    family: FlowFamily,
    root: Path,
    export_folder: Path,
    tuned_paths: Mapping[str, Path],
    alpha: float | None = None,
) -> dict:
    """Write a new folder in which the networks of some stages are the tuned ones.

    The networks are computed before other files are written, so weights that do not fit leave no files.

    Args:
        family: family of the generator.
        root: folder of the generator that was tuned, or the name of a bundled generator.
        export_folder: folder to write.
        tuned_paths: name of a stage -> folder or file with tuned weights, in a layout that
            policies.tuned_model reads.
        alpha: scale of adapters without an adapter_config.json; None: all adapters have this file.
    Returns: dictionary of values for JSON with three keys. "tuned" is a dictionary from the name of a stage
    to {"file": name of its file, "dtype": name of the smallest data type of its weights, "adapters": True if
    adapters were merged, "rounding": share of the update that is lost by rounding the weights to the data
    types of the file}. "kept" is a list of the names of the files that were linked. "elsewhere" is a list
    of the names of models to which the folder refers, and which it does not contain.
    Raises: FileNotFoundError or ValueError for weights that do not fit the stage, or for a family without
    export.
    """
    check_stages("export", family.stages_in(root), list(tuned_paths))
    if not isinstance(family, Exports):
        raise ValueError(
            f"export: generators of the family {family.name} cannot be exported. Use the adapter of the tuned"
            " network, or add the method `release` to the family."
        )
    release = family.release(root, tuple(tuned_paths))
    exported_stages = dict[str, dict]()
    for stage, stage_file in tqdm(release.networks.items(), desc="export", unit="stage", leave=False):
        # Merged in float32; `write` then rounds once, to the data types of the original file.
        merged_weights = merged_state(
            tuned_model(stage_file.load(torch.float32), tuned_paths[stage], alpha=alpha)
        )
        tuned_network = tuned_model(stage_file.load(None), tuned_paths[stage], alpha=alpha)
        dtypes = {name: tensor.dtype for name, tensor in merged_state(tuned_network).items()}
        has_adapters = bool(adapted_layers(tuned_network))
        exported_stages[stage] = {
            "file": stage_file.file,
            "dtype": str(smallest_dtype(dtypes.values())).removeprefix("torch."),
            "adapters": has_adapters,
            "rounding": (
                merge_rounding(tuned_network)
                if has_adapters
                else network_rounding(stage_file.load(torch.float32).state_dict(), merged_weights, dtypes)
            ),
        }
        stage_file.write(export_folder / stage_file.file, merged_weights)
    # Unchanged files are linked, because published weights are large. Changed settings are written as bytes.
    for file_name, original_or_bytes in release.files.items():
        if isinstance(original_or_bytes, bytes):
            write_atomic(export_folder / file_name, original_or_bytes)
        else:
            link(original_or_bytes, export_folder / file_name)
    linked_files = sorted(
        file_name
        for file_name, original_or_bytes in release.files.items()
        if isinstance(original_or_bytes, Path)
    )
    return {"tuned": exported_stages, "kept": linked_files, "elsewhere": list(release.elsewhere)}


def smallest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the floating-point data type with the largest rounding errors."""
    return max(
        (dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps
    )


def network_rounding(
    untuned: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]
) -> float:
    """Compute the share of a whole network's update that is lost when its weights are rounded.

    The share is the norm of the rounding error over the norm of the update, for all tensors together, as in
    `lora.merge_rounding`. It is 0 without any update.

    Args:
        untuned: float32 weights of the untuned network.
        tuned: float32 weights of the tuned network.
        dtypes: data types to which the weights are rounded.
    """
    squared_error = 0.0
    squared_update = 0.0
    for name, tensor in tuned.items():
        if not tensor.is_floating_point():
            continue
        # In float64, so that the measurement adds no rounding of its own.
        rounded = tensor.to(dtypes[name]).double()
        squared_error += float((rounded - tensor.double()).square().sum())
        squared_update += float((tensor.double() - untuned[name].double()).square().sum())
    return math.sqrt(squared_error / squared_update) if squared_update else 0.0
