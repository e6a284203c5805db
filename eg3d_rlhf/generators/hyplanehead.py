"""HyPlaneHead's family: three planes and a sphere over directions (Li et al. 2025).

Its planes alone would have the separable form; the sphere's share of every hidden unit depends on all three coordinates, so density is read
point by point.
"""

from eg3d_rlhf.generators import Family, register
from eg3d_rlhf.generators.fullhead import FullHead
from training.discriminator import DualDiscriminator
from training.fullhead import HyPlaneHeadGenerator


class HyPlaneHead(FullHead):
    """`Generator` around HyPlaneHead's network."""

    architecture = "hyplanehead"


register(Family("hyplanehead", HyPlaneHeadGenerator, DualDiscriminator, HyPlaneHead))
