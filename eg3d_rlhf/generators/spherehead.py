"""SphereHead's family: two balls of spherical planes (Li et al. 2024).

Angles and radius of a grid point depend on all three coordinates, so no part of a grid is shared: density is read point by point.
"""

from eg3d_rlhf.generators import Family, register
from eg3d_rlhf.generators.fullhead import FullHead
from training.discriminator import DualDiscriminator
from training.fullhead import SphereHeadGenerator


class SphereHead(FullHead):
    """`Generator` around SphereHead's network."""

    architecture = "spherehead"


register(Family("spherehead", SphereHeadGenerator, DualDiscriminator, SphereHead))
