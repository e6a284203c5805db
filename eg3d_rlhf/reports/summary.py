"""The end of a reward run: its table, before/after pictures and meshes.

Letters: N latents.
"""

from pathlib import Path

import torch

from eg3d_rlhf.generators import camera, ws_of_seeds
from eg3d_rlhf.reports.shape_view import shade
from eg3d_rlhf.seeds import JUDGE
from eg3d_rlhf.sigma.mesh import extract_mesh
from eg3d_rlhf.sigma.mesh_export import save_mesh
from eg3d_rlhf.sigma.slab import sigma_grid
from eg3d_rlhf.sigma.spec import SlabSpec
from training.image_grid import save_grid

SHOWN_SEEDS = JUDGE.take(8)
PSI = 0.7
RESOLUTION = 128  # grid points per edge of the cube that pictures and meshes come from


def rows(record: dict) -> list[tuple[str, str, str]]:
    """(what, figure, goal) lines of the table."""
    out = [("reward before / after (mean ± std)", _pair(record["reward_before"], record["reward_after"]), "")]
    positive = f"{record['reward_delta_positive']}/{record['reward_delta_n']}, mean {record['tuned_delta_mean']:+.3f}"
    out.append(("positive reward deltas", positive, ">= 95/100"))
    if record.get("control_delta_mean") is not None:
        share = abs(record["control_delta_mean"]) / max(abs(record["tuned_delta_mean"]), 1e-12)
        text = f"{record['control_delta_mean']:+.3f} ({share:.1%} of the tuned shift; {record['control_source']})"
        out.append(("mean delta of the lambda_r = 0 control", text, "<= 10 %"))
    elif record.get("control_source"):
        out.append(("mean delta of the lambda_r = 0 control", f"none: {record['control_source']}", "<= 10 %"))
    if "win_rate" in record:
        low, high = record["win_rate_ci95"]
        text = f"{record['win_rate']:.1%} of {record['win_rate_n']} [{low:.1%}, {high:.1%}]"
        out.append(("judge prefers the tuned shape (95 % interval)", text, ">= 74.4 %, aim 95 %"))
        ratio = record["frechet_after"] / record["frechet_before"]
        out.append(("Fréchet distance before -> after", f"{record['frechet_before']:.3f} -> {record['frechet_after']:.3f} (x{ratio:.3f})",
                    "<= x1.63, aim x1.10"))
    for row in record["geometry"]:
        verdict = "not worse" if row["better"] else "WORSE"
        out.append((row["name"], f"{row['before']:.4g} -> {row['after']:.4g} ({verdict})", "not worse"))
    if record.get("reward_test_accuracy") is not None:
        low, high = record["reward_test_accuracy_ci95"]
        text = f"{record['reward_test_accuracy']:.3f} [{low:.3f}, {high:.3f}] of {record['reward_test_n']}"
        out.append((f"reward's test accuracy against the {record['reward_test_against']}", text, ">= 0.85"))
    fallen = sorted({name for alarm in record["over_optimisation"] for name in alarm["fallen"]})
    out.append(("over-optimisation watch", f"ALARM: {', '.join(fallen)} fell while the reward rose" if fallen else "quiet", "quiet"))
    out.append(("time", f"{record['seconds']:.0f} s on {record['device']}", "<= 720 s"))
    return out


def _pair(before: dict, after: dict) -> str:
    return f"{before['mean']:.3f} ± {before['std']:.3f} -> {after['mean']:.3f} ± {after['std']:.3f}"


def print_summary(record: dict, run_dir: Path) -> None:
    """Print the table and where the files are."""
    lines = rows(record)
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    print()
    for what, figure, goal in [("what", "figure", "goal"), *lines]:
        print(f"{what:<{widths[0]}}  {figure:<{widths[1]}}  {goal}")
    print(f"\nWritten to {run_dir}: summary.json, shapes.png, images.png (top row before, bottom row after), meshes/*.ply")


@torch.no_grad()
def write_pictures(before: torch.nn.Module, after: torch.nn.Module, run_dir: Path, record: dict) -> None:
    """shapes.png and images.png, before above after for the same latents, and meshes of the first three."""
    del record
    box_warp = float(before.rendering_kwargs["box_warp"])
    spec = SlabSpec.cube(RESOLUTION, box_warp)
    shapes, images = [], []
    (run_dir / "meshes").mkdir(parents=True, exist_ok=True)
    for name, G in (("before", before), ("after", after)):
        ws = ws_of_seeds(G, list(SHOWN_SEEDS), truncation_psi=PSI)
        sigma = sigma_grid(G, ws, spec)
        shapes += [shade(sigma, yaw) for yaw in (0.0, 0.5)]
        torch.manual_seed(0)
        images.append(G.synthesis(ws, camera(G, yaw=0.3, n=len(ws)), noise_mode="const")["image"].cpu())
        for seed, cube in list(zip(SHOWN_SEEDS, sigma.cpu(), strict=True))[:3]:
            try:
                save_mesh(run_dir / "meshes" / f"seed{seed}-{name}.ply", *extract_mesh(cube, spec))
            except ValueError as error:  # a sample without a surface: say so, keep the rest
                print(f"No mesh for seed {seed} ({name}): {error}")
    save_grid(torch.cat(shapes), (0, 1), len(SHOWN_SEEDS), run_dir / "shapes.png")
    save_grid(torch.cat(images), (-1, 1), len(SHOWN_SEEDS), run_dir / "images.png")
