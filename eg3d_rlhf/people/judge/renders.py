"""Renders of assets for a judge: montages of the nine views, cached by the hash of the asset.

A montage has three rows of three views, with the direction below each view. The cache is a `Store`, so that
an asset is rendered once for all pairs, criteria and runs. Only montages are sent to a server: neither a file
nor its name.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.experiments.store import Store
from eg3d_rlhf.geometry.files.model import Model
from eg3d_rlhf.people.judge.rig import VIEW_NAMES, Rig
from eg3d_rlhf.people.judge.settings import VIEW_MODES
from eg3d_rlhf.people.judge.view_maps import (
    ColouredMesh,
    ViewMaps,
    field_maps,
    images_of,
    is_pale,
    mesh_maps,
    model_maps,
    splat_maps,
)
from eg3d_rlhf.people.label.assets.reading import asset_hash, read_asset
from training.progress import tqdm
from training.storage import write_atomic

CACHE = Path("runs/judge-renders")  # default folder of the cache
# Version of the renderers; part of every key. It is increased when an asset would look different.
VERSION = 1
_COLUMNS = 3  # views in a row of a montage; nine views give a square, which models scale least
_CAPTION = 28  # pixels of a caption
_KIND = "renders"  # start of the names of folders in the cache


@dataclass(frozen=True)
class StoredRenders:
    """Montages of one asset in a folder; files are read when they are sent."""

    folder: Path
    record: Mapping[str, Sequence[Mapping[str, Any]]]  # view mode -> [{"file", "sha256", "bytes"}]

    def images(self, mode: str) -> list[bytes]:
        """Return the PNG files of a view mode."""
        return [(self.folder / entry["file"]).read_bytes() for entry in self.record[mode]]

    def hashes(self, mode: str) -> list[str]:
        """Return the SHA-256 of each file."""
        return [str(entry["sha256"]) for entry in self.record[mode]]

    def sizes(self, mode: str) -> list[int]:
        """Return the number of bytes of each file."""
        return [int(entry["bytes"]) for entry in self.record[mode]]


class RenderCache:
    """Renders of assets by the fixed rig, which are made once.

    Args:
        folder: folder of the cache.
        rig: cameras and size of the renders.
    """

    def __init__(self, folder: Path = CACHE, rig: Rig | None = None):
        self.rig = rig or Rig()
        # Renders that were deleted or changed by hand are made again.
        self._store = Store(folder, renew=True)

    def views_of(self, path: Path, up: str = "y", root: Path | None = None) -> StoredRenders:
        """Return the renders of an asset file (GLB, PLY, OBJ, or a PLY of Gaussian splats).

        Args:
            path: the file.
            up: axis of the file that points up, "y" or "z".
            root: folder in which the file's textures may lie; None: the folder of the file.

        Raises: ValueError or OSError, which name the file, if it cannot be read or shown.
        """
        try:
            return self.of_maps(
                {"asset": asset_hash(path, root), "up": up}, lambda: asset_maps(path, self.rig, up, root)
            )
        except (ValueError, OSError) as error:
            # The readers do not know the name of the file that they were given.
            raise type(error)(f"{path.name}: {error}") from None

    def views_of_model(self, model: Model, key: str) -> StoredRenders:
        """Return the renders of a mesh in memory, such as a damaged copy. `key` names its content."""
        return self.of_maps({"model": key}, lambda: model_maps(model, self.rig))

    def views_of_mesh(self, mesh: ColouredMesh) -> StoredRenders:
        """Return the renders of a mesh with vertex colours, such as the level set of a field."""
        # A mesh in memory has no file whose hash could be its key.
        digest = hashlib.sha256()
        for array in (mesh.vertices, mesh.faces, mesh.colours):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return self.of_maps({"mesh": digest.hexdigest()}, lambda: mesh_maps(mesh, self.rig))

    def views_of_field(self, field: Field, key: str) -> StoredRenders:
        """Return the renders of a field of one shape by ray marching. `key` names its content."""
        return self.of_maps({"field": key}, lambda: field_maps(field, self.rig))

    def of_maps(self, content: Mapping[str, str], make_maps: Callable[[], ViewMaps]) -> StoredRenders:
        """Return the renders of an asset, from the cache or from new maps.

        Args:
            content: what identifies the content of the asset, in JSON types.
            make_maps: function that renders the maps.
        """
        # Another rig gives other images, and is another judge to a calibration.
        inputs = {"version": VERSION, "rig": self.rig.to_json(), **content}

        def maker(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            """Write the montages of all modes, and return their files and their record."""
            files = []
            record: dict[str, list[dict[str, Any]]] = {}
            for mode, montages in montages_of(make_maps(), self.rig).items():
                record[mode] = []
                for index, png in enumerate(montages):
                    # The index counts grounds: 0 is grey, 1 is the second one.
                    path = folder / f"{mode}-{index}.png"
                    write_atomic(path, png)
                    files.append(path)
                    record[mode].append(
                        {
                            "file": path.name,
                            "sha256": hashlib.sha256(png).hexdigest(),
                            "bytes": len(png),
                        }
                    )
            return files, record

        # The store locks the folder, so that two processes do not render the same asset.
        artefact = self._store.make(_KIND, inputs, maker)
        return StoredRenders(artefact.folder, artefact.record)

    def views_of_all(
        self, paths: Iterable[Path], up: str = "y", root: Path | None = None
    ) -> dict[Path, StoredRenders]:
        """Return the renders of several asset files, with a bar that shows the progress.

        Raises: ValueError or OSError, which name the file, for the first file that cannot be shown.
        """
        # Assets of a tournament occur in many pairs.
        unique_paths = list(dict.fromkeys(paths))
        with tqdm(total=len(unique_paths), desc="rendering", unit="asset") as progress_bar:
            renders = {}
            for path in unique_paths:
                # One after another: the rasteriser uses the memory of one asset at a time.
                renders[path] = self.views_of(path, up, root)
                progress_bar.update()
        return renders


def asset_maps(path: Path, rig: Rig, up: str = "y", root: Path | None = None) -> ViewMaps:
    """Read an asset file, and render its maps. For arguments and errors, see `RenderCache.views_of`."""
    # Read again for each rendering, so that no asset stays in memory.
    asset = read_asset(path, root)
    return model_maps(asset, rig, up) if isinstance(asset, Model) else splat_maps(asset, rig, up)


def montages_of(maps: ViewMaps, rig: Rig) -> dict[str, list[bytes]]:
    """Return the montages of all view modes as PNG files.

    The mode "textured" has a second montage on another ground if the asset is pale (`is_pale`).
    """
    montages = {}
    for mode in VIEW_MODES:
        # Shaded views and normals always differ from a grey ground.
        grounds = [rig.ground]
        if mode == "textured" and is_pale(maps, rig):
            grounds.append(rig.second_ground)
        montages[mode] = [montage(images_of(maps, mode, ground), ground) for ground in grounds]
    return montages


def montage(images: np.ndarray, ground: int) -> bytes:
    """Arrange the nine views in three rows with captions, and return the PNG file.

    Args:
        images: views [9, R, R, 3] uint8, in the order of VIEW_NAMES.
        ground: grey of the captions' ground, 0..255.
    """
    resolution = images.shape[1]
    # rounded up
    rows = -(-len(images) // _COLUMNS)
    sheet = Image.new(
        "RGB", (_COLUMNS * resolution, rows * (resolution + _CAPTION)), (ground, ground, ground)
    )
    draw = ImageDraw.Draw(sheet)
    # The font of Pillow, which is the same on every machine.
    font = ImageFont.load_default(size=18)
    for index, (image, name) in enumerate(zip(images, VIEW_NAMES, strict=True)):
        left = index % _COLUMNS * resolution
        top = index // _COLUMNS * (resolution + _CAPTION)
        sheet.paste(Image.fromarray(image), (left, top))
        # Below the view, so that no caption covers the asset.
        draw.text((left + 6, top + resolution + 2), name, fill=(0, 0, 0), font=font)
    buffer = io.BytesIO()
    # level 4 is half as fast to read and twice as fast to write as the default, for 5 % more bytes
    sheet.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
