"""What draws the assets of a campaign, and the pictures of their prompts."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from eg3d_rlhf.people.label.assets import reading
from eg3d_rlhf.people.label.entities import Shape
from eg3d_rlhf.people.label.shape_files import ShapeCache


class AssetDrawer:
    """Gives assets their clean form; see `preparation.Drawer`."""

    def generator(self, shape: Shape) -> object:
        """Nothing: an asset is the file itself."""

    def mesh(self, shape: Shape) -> bytes:
        """gzip of a GLB or of GSP1, or an MP4. Raises: as `reading.clean`."""
        return reading.clean(Path(shape.source), shape.file, shape.degradation, shape.seed)

    def picture(self, shape: Shape) -> bytes:
        """None is made. Raises: ValueError."""
        raise ValueError("expected a generator's shape, got an asset, of which no picture is made")


def prepare_prompts(conditions: Iterable[Mapping], cache: ShapeCache) -> None:
    """Make the pictures of prompts that are missing in the cache; one that cannot be shown is noted."""
    for condition in conditions:
        key = condition.get("hash")
        if not key or cache.prompt_settled(key):
            continue
        try:
            cache.put_prompt(key, reading.clean(Path(condition["image"]), key))
        except ValueError as error:
            cache.put_prompt_failure(key, str(error))
