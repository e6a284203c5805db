"""Image snapshots: grids of reals and fakes as PNG.

Shapes: N images, C channels, H x W pixels.
"""

from pathlib import Path

import numpy as np
import PIL.Image
import torch


def save_grid(images: np.ndarray | torch.Tensor, value_range: tuple[float, float], columns: int, path: str | Path) -> None:
    """Write images [N, C, H, W] (C 1 or 3) as one PNG, `columns` to a row; `value_range` maps to black and white."""
    x = np.asarray(images.detach().cpu() if isinstance(images, torch.Tensor) else images, dtype=np.float32)
    low, high = value_range
    x = np.clip(np.rint((x - low) * (255 / max(high - low, 1e-12))), 0, 255).astype(np.uint8)
    n, c, h, w = x.shape
    rows = -(-n // columns)
    canvas = np.full([rows * columns, c, h, w], 255, dtype=np.uint8)
    canvas[:n] = x
    canvas = canvas.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    PIL.Image.fromarray(canvas[:, :, 0] if c == 1 else canvas).save(path)
