"""Cameras: poses that look at a point, intrinsics, camera labels, mirrored poses, and the rays of pixels.

World axes: x points right, y points up, z points towards the camera of a frontal portrait. Camera axes are
those of OpenCV: x points right, y down, z forward.

Shapes: N is the number of cameras, R the number of pixels per edge, and M = R * R the number of rays.
"""

import math

import torch

POSE_NUMBERS = 16  # entries of a row-major 4 x 4 matrix cam2world
INTRINSICS_NUMBERS = 9  # entries of a row-major 3 x 3 matrix of intrinsics, normalised by the image size
LABEL_NUMBERS = POSE_NUMBERS + INTRINSICS_NUMBERS
# Focal length divided by the image size in the labels of FFHQ, 4.2647. In `FOV_to_intrinsics` it corresponds
# to 18.83 degrees.
FFHQ_FOCAL = 2985.29 / 700
FFHQ_RADIUS = 2.7  # distance of the camera from the origin, world units

# Smallest distance of the pitch from 0 and pi, radians. At these poles the up direction is undefined.
_PITCH_MARGIN = 1e-5


def camera_position(horizontal: torch.Tensor, vertical: torch.Tensor, radius: float) -> torch.Tensor:
    """Return points on a sphere about the world's origin, given yaw and pitch.

    With the yaw h, the pitch v, the radius r and the polar angle phi (0 is the +y axis), as in EG3D:
    phi = arccos(1 - 2 v / pi);  position = r (sin phi cos(pi - h), cos phi, sin phi sin(pi - h)).
    Differentiable in horizontal and vertical inside the clamp [1e-5, pi - 1e-5] of the pitch.

    Args:
        horizontal: yaw h [N, 1] in radians. pi/2 is frontal; smaller values move the camera towards -x.
        vertical: pitch v [N, 1] in (0, pi). pi/2 is level; smaller values look from above. The height depends
            linearly on v. Therefore the polar angle phi equals v only at pi/2, where d phi / d v = 2/pi.
        radius: distance r from the origin, world units.
    Returns: positions [N, 3].
    """
    v = vertical.clamp(_PITCH_MARGIN, math.pi - _PITCH_MARGIN)
    # With a uniform v, positions are uniform on the sphere (inverse transform sampling).
    phi = torch.arccos(1 - 2 * (v / math.pi))
    theta = math.pi - horizontal
    return radius * torch.cat([phi.sin() * theta.cos(), phi.cos(), phi.sin() * theta.sin()], dim=1)


def look_at(position: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the poses of cameras that look at a target, with the y axis of the world up.

    The columns of a pose are right = -normalise(up x forward), down = forward x right, forward, and the
    position. The minus sign gives OpenCV's camera axes (y down) in a world whose y axis points up.
    Differentiable in both arguments, unless the view direction is vertical.

    Args:
        position: positions of the cameras [N, 3], world units.
        target: points that the cameras look at, [3] or [N, 3].
    Returns: cam2world matrices [N, 4, 4].
    """
    forward_axis = torch.nn.functional.normalize(target - position, dim=-1)  # [N, 3]
    world_up = torch.tensor([0.0, 1.0, 0.0], dtype=position.dtype, device=position.device).expand_as(
        forward_axis
    )
    right_axis = -torch.nn.functional.normalize(torch.linalg.cross(world_up, forward_axis), dim=-1)
    down_axis = torch.nn.functional.normalize(torch.linalg.cross(forward_axis, right_axis), dim=-1)
    upper_rows = torch.stack([right_axis, down_axis, forward_axis, position], dim=-1)  # [N, 3, 4]
    last_row = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=position.dtype, device=position.device).expand(
        len(position), 1, 4
    )
    return torch.cat([upper_rows, last_row], dim=1)


class LookAtPoseSampler:
    """Sampler of camera poses on a sphere about the origin, with normally distributed angles.

    All cameras look at one point.

    The name and the order of arguments are EG3D's. Torch's global generator yields the noise of the yaw [N,
    1], and then the noise of the pitch [N, 1], even if both standard deviations are 0. Callers may rely on
    this order.
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
        """Sample N camera poses.

        Args:
            horizontal_mean, vertical_mean: means of yaw and pitch in radians, see `camera_position`.
            lookat_position: point [3] that the cameras look at, world units.
            horizontal_stddev, vertical_stddev: standard deviations of yaw and pitch in radians.
            radius: distance from the origin, world units.
            batch_size: number of poses N.
            device: device of the result.
        Returns: cam2world matrices [N, 4, 4].
        """
        # Noise of standard deviation 0 is drawn, too, because the number of random values must not depend on
        # the arguments.
        yaw = torch.randn((batch_size, 1), device=device) * horizontal_stddev + horizontal_mean
        pitch = torch.randn((batch_size, 1), device=device) * vertical_stddev + vertical_mean
        return look_at(
            camera_position(yaw, pitch, radius),
            torch.as_tensor(lookat_position, dtype=torch.float32, device=device),
        )


def intrinsics_matrix(focal: float, device="cpu") -> torch.Tensor:
    """Return intrinsics [3, 3] of a square image, normalised by its size.

    The principal point is the centre of the image, (0.5, 0.5).

    Args: focal: focal length divided by the image size; device: device of the result.
    """
    return torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]], device=device)


def FOV_to_intrinsics(fov_degrees: float, device="cpu") -> torch.Tensor:  # noqa: N802 (EG3D's public name)
    """Return intrinsics [3, 3] of a square image from its field of view along the DIAGONAL.

    The intrinsics are normalised by the image size. The focal length is f = 1 / (1.414 tan(fov * 3.14159 /
    360)), with the rounded constants of EG3D. A field of view of 18.837 degrees gives 4.2634, while the
    labels of FFHQ contain 4.2647 (`FFHQ_FOCAL`).

    Args: fov_degrees: field of view along the diagonal; device: device of the result.
    """
    return intrinsics_matrix(1 / (math.tan(fov_degrees * 3.14159 / 360) * 1.414), device)


def pack_label(cam2world: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """Return camera labels [N, 25], which contain the pose and then the intrinsics, both row-major.

    Args:
        cam2world: poses [N, 4, 4].
        intrinsics: normalised intrinsics, [N, 3, 3], or [3, 3] for all cameras.
    """
    assert cam2world.ndim == 3 and cam2world.shape[1:] == (4, 4) and intrinsics.shape[-2:] == (3, 3)
    intrinsics_of_cameras = intrinsics.expand(len(cam2world), 3, 3)
    return torch.cat(
        [cam2world.reshape(-1, POSE_NUMBERS), intrinsics_of_cameras.reshape(-1, INTRINSICS_NUMBERS)], dim=1
    )


def unpack_label(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the poses cam2world [N, 4, 4] and the intrinsics [N, 3, 3] of camera labels c [N, 25]."""
    assert c.ndim == 2 and c.shape[1] == LABEL_NUMBERS
    return c[:, :POSE_NUMBERS].reshape(-1, 4, 4), c[:, POSE_NUMBERS:].reshape(-1, 3, 3)


def mirror_pose(cam2world: torch.Tensor) -> torch.Tensor:
    """Mirror poses P [..., 4, 4] at the plane x = 0.

    From the mirrored pose, the mirrored world looks like the horizontally mirrored image. The result is F P F
    with F = diag(-1, 1, 1, 1), which negates the entries (0,1), (0,2), (1,0), (2,0) and (0,3). Mirroring
    twice gives the original pose. Differentiable in its argument.
    """
    # Entry (i, j) is multiplied by signs[i] * signs[j], which is the product F P F.
    signs = torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=cam2world.dtype, device=cam2world.device)
    return cam2world * signs[:, None] * signs


def mirror_label(c: torch.Tensor) -> torch.Tensor:
    """Return the camera labels [N, 25] of horizontally mirrored images, given the labels c [N, 25].

    The pose is mirrored, the skew is negated, and the principal point cx becomes 1 - cx.
    """
    # The matrices are views of a copy, so that the change below does not affect c.
    cam2world, intrinsics = unpack_label(c.clone())
    intrinsics[:, 0, 1] = -intrinsics[:, 0, 1]  # skew
    intrinsics[:, 0, 2] = 1 - intrinsics[:, 0, 2]  # cx
    return pack_label(mirror_pose(cam2world), intrinsics)


class RaySampler(torch.nn.Module):
    """Module that computes the rays of pixels in world coordinates. It has no parameters."""

    def forward(
        self, cam2world_matrix: torch.Tensor, intrinsics: torch.Tensor, resolution: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one ray through the centre of each pixel, in row-major order of pixels.

        The pixel (row, column) has the image coordinates u = (column + .5) / R and v = (row + .5) / R. Let K
        be the intrinsics, with the focal lengths fx = K00 and fy = K11, the skew sk = K01 and the principal
        point (cx, cy) = (K02, K12). The point of the pixel in camera coordinates is y = (v - cy) / fy, x = (u
        - cx + cy sk / fy - sk v / fy) / fx, z = 1.

        Args:
            cam2world_matrix: poses [N, 4, 4].
            intrinsics: intrinsics [N, 3, 3], normalised by the image size.
            resolution: pixels per edge R.
        Returns: origins [N, M, 3] in world units, and directions [N, M, 3] of unit length.
        """
        # Multiplied by 1 / R instead of divided by R, as in EG3D, so that rounding agrees.
        pixel_centres = (torch.arange(resolution, dtype=torch.float32, device=intrinsics.device) + 0.5) * (
            1.0 / resolution
        )
        v, u = torch.meshgrid(pixel_centres, pixel_centres, indexing="ij")
        u = u.reshape(1, -1)  # [1, M]
        v = v.reshape(1, -1)  # [1, M]
        # [N, 1] each, to broadcast over rays.
        fx, fy, cx, cy, skew = (
            intrinsics[:, i, j].unsqueeze(-1) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2), (0, 1))
        )
        y = (v - cy) / fy
        x = (u - cx + cy * skew / fy - skew * v / fy) / fx
        points = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [N, M, 3]
        directions = points @ cam2world_matrix[:, :3, :3].transpose(1, 2)  # rotated to world axes, [N, M, 3]
        directions = torch.nn.functional.normalize(directions, dim=2)
        # All rays of a camera start at its position. `expand` does not copy.
        origins = cam2world_matrix[:, None, :3, 3].expand(-1, directions.shape[1], -1)
        return origins, directions


def ray_limits_box(
    origins: torch.Tensor, directions: torch.Tensor, box_side: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distances at which rays enter and leave a cube about the origin.

    The cube is the intersection of three slabs, each between two parallel faces (slab method).

    Args:
        origins: origins of the rays [N, M, 3], world units.
        directions: unit directions of the rays [N, M, 3].
        box_side: edge length of the cube, world units.
    Returns: the distances at which the rays enter and leave the cube, two tensors [N, M, 1], world units. A
        ray that misses the cube has the distances -1 and -2.
    """
    half_side = box_side / 2
    # A ray that is parallel to an axis gives +-inf here, which the minima and maxima below handle.
    inverse_directions = 1 / directions
    low_face_distance = (-half_side - origins) * inverse_directions  # [N, M, 3], one for each axis
    high_face_distance = (half_side - origins) * inverse_directions
    # The ray is inside the cube from its last entry into a slab to its first exit from one.
    near_distance = torch.minimum(low_face_distance, high_face_distance).amax(dim=-1, keepdim=True)
    far_distance = torch.maximum(low_face_distance, high_face_distance).amin(dim=-1, keepdim=True)
    is_miss = near_distance > far_distance
    return near_distance.masked_fill(is_miss, -1), far_distance.masked_fill(is_miss, -2)
