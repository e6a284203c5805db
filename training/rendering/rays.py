"""Camera rays: one per pixel centre.

Shapes: N batch, M = R*R rays, R resolution.
"""

import torch


class RaySampler(torch.nn.Module):
    """World-space rays from OpenCV cameras (x right, y down, z forward); intrinsics are normalised by the image size."""

    def forward(self, cam2world_matrix: torch.Tensor, intrinsics: torch.Tensor, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rays in row-major pixel order.

        Pixel (row, col) has u = (col+.5)/R, v = (row+.5)/R and camera point
        y = (v - cy)/fy, x = (u - cx + cy sk/fy - sk v/fy)/fx, z = 1, with fx = K00, fy = K11, sk = K01.

        Args:
            cam2world_matrix: [N, 4, 4]; intrinsics: [N, 3, 3]; resolution: pixels per edge.
        Returns: origins [N, M, 3] and unit directions [N, M, 3].
        """
        steps = (torch.arange(resolution, dtype=torch.float32, device=intrinsics.device) + 0.5) * (1.0 / resolution)
        v, u = torch.meshgrid(steps, steps, indexing="ij")
        u, v = u.reshape(1, -1), v.reshape(1, -1)  # [1, M]
        fx, fy, cx, cy, skew = (intrinsics[:, i, j].unsqueeze(-1) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2), (0, 1)))
        y = (v - cy) / fy
        x = (u - cx + cy * skew / fy - skew * v / fy) / fx
        points = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [N, M, 3]
        directions = points @ cam2world_matrix[:, :3, :3].transpose(1, 2)
        directions = torch.nn.functional.normalize(directions, dim=2)
        origins = cam2world_matrix[:, None, :3, 3].expand(-1, directions.shape[1], -1)
        return origins, directions


def ray_limits_box(origins: torch.Tensor, directions: torch.Tensor, box_side: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Entry and exit distances of rays through the cube [-box_side/2, box_side/2]^3 (slab method).

    Args:
        origins, directions: [N, M, 3].
    Returns: near, far [N, M, 1]; a ray that misses has near = -1 and far = -2.
    """
    half = box_side / 2
    inverse = 1 / directions
    t0, t1 = (-half - origins) * inverse, (half - origins) * inverse
    near = torch.minimum(t0, t1).amax(dim=-1, keepdim=True)
    far = torch.maximum(t0, t1).amin(dim=-1, keepdim=True)
    miss = near > far
    return near.masked_fill(miss, -1), far.masked_fill(miss, -2)
