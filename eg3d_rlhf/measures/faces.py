"""Share of pictures in which an outside detector finds a face: scikit-image's cascade of local binary
patterns, which learnt from photographs and comes with the package.

It is strict: of pictures of the family's true heads from in front, yaw and pitch drawn as for training, it
finds three in four. A share that falls says that faces were harmed. Images are float [N, 3, H, W] in [-1, 1].
"""

import numpy as np
from torch import Tensor

from eg3d_rlhf.measures.features import to_resolution

PIXELS = 128  # of the pictures that it reads
SMALLEST = 40  # of a face


def faces_found(images: Tensor) -> np.ndarray:
    """Whether there is a face in each of images [N, 3, H, W]: [N] bool.

    Raises: ValueError without scikit-image.
    """
    try:
        from skimage.data import lbp_frontal_face_cascade_filename
        from skimage.feature import Cascade
    except ImportError:
        raise ValueError(
            "detector of faces: expected scikit-image, found none. Install it: pip install 'eg3d-rlhf[dev]'."
        ) from None
    detector = Cascade(lbp_frontal_face_cascade_filename())
    pixels = (
        (to_resolution(images, PIXELS) * 127.5 + 127.5)
        .round()
        .clamp(0, 255)
        .byte()
        .permute(0, 2, 3, 1)
        .contiguous()
        .cpu()
        .numpy()
    )
    size = {"min_size": (SMALLEST, SMALLEST), "max_size": (PIXELS - 1, PIXELS - 1)}
    return np.array(
        [
            bool(detector.detect_multi_scale(img=image, scale_factor=1.1, step_ratio=1, **size))
            for image in pixels
        ]
    )
