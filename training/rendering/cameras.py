"""Cameras and their rays: look-at pose samplers, intrinsics, label packing, pose mirroring, rays of pixels.

World axes: x right, +y up, +z towards the camera of a frontal portrait. Camera axes are OpenCV's: x right, y
down, z forward.

Shape letters: N cameras, M = R*R rays, R resolution.
"""

import math

import torch

POSE_NUMBERS = 16  # row-major cam2world
INTRINSICS_NUMBERS = 9  # row-major 3x3, normalised by the image size
LABEL_NUMBERS = POSE_NUMBERS + INTRINSICS_NUMBERS
# Focal length over image size of the FFHQ labels, 4.2647; by the rule of FOV_to_intrinsics, 18.83 degrees.
FFHQ_FOCAL = 2985.29 / 700
FFHQ_RADIUS = 2.7  # distance of the camera from its pivot, world units

_PITCH_MARGIN = 1e-5  # keeps the camera off the poles, where "up" is undefined


def camera_position(horizontal: torch.Tensor, vertical: torch.Tensor, radius: float) -> torch.Tensor:
    """Return points on a sphere about the world's origin, given yaw and pitch.

    phi = arccos(1 - 2 v / pi);  position = r (sin phi cos(pi - h), cos phi, sin phi sin(pi - h)).

    Args:
        horizontal: [N, 1] yaw h in radians. pi/2 is frontal; smaller values move the camera towards -x.
        vertical: [N, 1] pitch parameter v in (0, pi). pi/2 is level; smaller values look from above. v is
            uniform in height. Therefore the polar angle phi equals v only at pi/2, where d phi / d v = 2/pi.
        radius: distance from the origin, world units.
    Returns: [N, 3] positions. Differentiable in horizontal and vertical inside the clamp [1e-5, pi - 1e-5].
    """
    v = vertical.clamp(_PITCH_MARGIN, math.pi - _PITCH_MARGIN)
    # Uniform in v gives uniform density on the sphere (inverse transform sampling). EG3D uses this rule.
    phi = torch.arccos(1 - 2 * (v / math.pi))
    theta = math.pi - horizontal
    return radius * torch.cat([phi.sin() * theta.cos(), phi.cos(), phi.sin() * theta.sin()], dim=1)


def look_at(position: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return cam2world matrices of cameras that look at a target, with world y up.

    Columns: right = -normalise(up x forward), down = forward x right, forward; then the position. The signs
    of the first two make the matrix OpenCV's (y down) while the world keeps y up.

    Args:
        position: [N, 3].
        target: [3] or [N, 3].
    Returns: [N, 4, 4]. Differentiable in both arguments; singular if the view direction is vertical.
    """
    forward = torch.nn.functional.normalize(target - position, dim=-1)  # [N, 3]
    world_up = torch.tensor([0.0, 1.0, 0.0], dtype=position.dtype, device=position.device).expand_as(forward)
    right = -torch.nn.functional.normalize(torch.linalg.cross(world_up, forward), dim=-1)
    down = torch.nn.functional.normalize(torch.linalg.cross(forward, right), dim=-1)
    top = torch.stack([right, down, forward, position], dim=-1)  # [N, 3, 4]
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=position.dtype, device=position.device).expand(
        len(position), 1, 4
    )
    return torch.cat([top, bottom], dim=1)


class LookAtPoseSampler:
    """Sampler of normally distributed poses on a sphere about the origin that look at any point.

    Name and order of arguments are EG3D's. Random numbers come from torch's global generator: the yaw noise
    [N, 1], then the pitch noise [N, 1], even if both standard deviations are 0. The order is part of the
    interface.
    """

    @staticmethod
    def sample(
        horizontal_mean,
        vertical_mean,
        lookat_position,
        horizontal_stddev=0,
        vertical_stddev=0,
        radius=1,
        batch_size=1,
        device="cpu",
    ) -> torch.Tensor:
        """Return cam2world matrices [N, 4, 4].

        Args:
            horizontal_mean, vertical_mean, horizontal_stddev, vertical_stddev: radians, see
                `camera_position`.
            lookat_position: [3], world units.
            radius: world units.
        """
        # Multiplied by 0 instead of skipped: the number of random values must not depend on the arguments.
        h = torch.randn((batch_size, 1), device=device) * horizontal_stddev + horizontal_mean
        v = torch.randn((batch_size, 1), device=device) * vertical_stddev + vertical_mean
        return look_at(
            camera_position(h, v, radius),
            torch.as_tensor(lookat_position, dtype=torch.float32, device=device),
        )


def intrinsics_matrix(focal: float, device="cpu") -> torch.Tensor:
    """Return intrinsics [3, 3] of a square image, normalised by its size.

    Both focal lengths are `focal`; the principal point is the image's centre (.5, .5).
    """
    return torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]], device=device)


def FOV_to_intrinsics(fov_degrees: float, device="cpu") -> torch.Tensor:  # noqa: N802 (EG3D's public name)
    """Return intrinsics [3, 3] of a square image whose DIAGONAL spans `fov_degrees`, normalised by its size.

    f = 1 / (1.414 tan(fov * 3.14159 / 360)), with EG3D's rounded constants. 18.837 degrees give 4.2634, while
    the FFHQ labels themselves contain 4.2647 (`FFHQ_FOCAL`).
    """
    return intrinsics_matrix(1 / (math.tan(fov_degrees * 3.14159 / 360) * 1.414), device)


def pack_label(cam2world: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """Return camera labels [N, 25]: the pose, then the intrinsics, both row-major.

    Args:
        cam2world: [N, 4, 4].
        intrinsics: [3, 3] or [N, 3, 3].
    """
    assert cam2world.ndim == 3 and cam2world.shape[1:] == (4, 4) and intrinsics.shape[-2:] == (3, 3)
    k = intrinsics.expand(len(cam2world), 3, 3)
    return torch.cat([cam2world.reshape(-1, POSE_NUMBERS), k.reshape(-1, INTRINSICS_NUMBERS)], dim=1)


def unpack_label(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cam2world [N, 4, 4] and intrinsics [N, 3, 3] of labels c [N, 25]."""
    assert c.ndim == 2 and c.shape[1] == LABEL_NUMBERS
    return c[:, :POSE_NUMBERS].reshape(-1, 4, 4), c[:, POSE_NUMBERS:].reshape(-1, 3, 3)


def mirror_pose(cam2world: torch.Tensor) -> torch.Tensor:
    """Return the pose [..., 4, 4] from which the x-mirrored world looks like the mirrored image.

    The pose is F P F with F = diag(-1, 1, 1, 1), which negates the entries (0,1), (0,2), (1,0), (2,0) and
    (0,3). Applied twice, it gives the original pose. Differentiable in its argument.
    """
    signs = torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=cam2world.dtype, device=cam2world.device)
    return cam2world * signs[:, None] * signs


def mirror_label(c: torch.Tensor) -> torch.Tensor:
    """Return the camera labels [N, 25] of the horizontally mirrored images.

    The pose is mirrored, the skew is negated, and cx becomes 1 - cx.
    """
    cam2world, k = unpack_label(c.clone())  # views of the copy, so that c stays as it is
    k[:, 0, 1], k[:, 0, 2] = -k[:, 0, 1], 1 - k[:, 0, 2]
    return pack_label(mirror_pose(cam2world), k)


class RaySampler(torch.nn.Module):
    """World-space rays of OpenCV cameras (x right, y down, z forward).

    Intrinsics are normalised by the image size.
    """

    def forward(
        self, cam2world_matrix: torch.Tensor, intrinsics: torch.Tensor, resolution: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one ray per pixel centre, in row-major order of pixels.

        Pixel (row, col) has u = (col + .5) / R, v = (row + .5) / R. Its point in camera space is
        y = (v - cy) / fy, x = (u - cx + cy sk / fy - sk v / fy) / fx, z = 1, with fx = K00, fy = K11, sk =
        K01.

        Args:
            cam2world_matrix: [N, 4, 4].
            intrinsics: [N, 3, 3].
            resolution: pixels per edge.
        Returns: origins [N, M, 3] and unit directions [N, M, 3].
        """
        steps = (torch.arange(resolution, dtype=torch.float32, device=intrinsics.device) + 0.5) * (
            1.0 / resolution
        )
        v, u = torch.meshgrid(steps, steps, indexing="ij")
        u = u.reshape(1, -1)  # [1, M]
        v = v.reshape(1, -1)  # [1, M]
        # [N, 1] each, to broadcast over rays.
        fx, fy, cx, cy, skew = (
            intrinsics[:, i, j].unsqueeze(-1) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2), (0, 1))
        )
        y = (v - cy) / fy
        x = (u - cx + cy * skew / fy - skew * v / fy) / fx
        points = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [N, M, 3]
        directions = points @ cam2world_matrix[:, :3, :3].transpose(1, 2)  # rotate to world axes, [N, M, 3]
        directions = torch.nn.functional.normalize(directions, dim=2)
        # All rays of a camera start at its centre; expand() makes no copies.
        origins = cam2world_matrix[:, None, :3, 3].expand(-1, directions.shape[1], -1)
        return origins, directions


def ray_limits_box(
    origins: torch.Tensor, directions: torch.Tensor, box_side: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return entry and exit distances of rays through the cube [-box_side/2, box_side/2]^3.

    The cube is the intersection of three slabs, one per axis (slab method).

    Args:
        origins, directions: [N, M, 3].
        box_side: world units.
    Returns: near, far [N, M, 1]. A ray that misses the cube has near = -1 and far = -2.
    """
    half = box_side / 2
    # A ray parallel to an axis gives +-inf here, which the minima and maxima below handle.
    inverse = 1 / directions
    t0 = (-half - origins) * inverse
    t1 = (half - origins) * inverse
    # The ray is inside once it has entered the last slab, until it leaves the first one.
    near = torch.minimum(t0, t1).amax(dim=-1, keepdim=True)
    far = torch.maximum(t0, t1).amin(dim=-1, keepdim=True)
    miss = near > far
    return near.masked_fill(miss, -1), far.masked_fill(miss, -2)
