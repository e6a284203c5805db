"""The attribution report of tiny networks, with a ball to turn where they have no surface."""

import dataclasses
from pathlib import Path

import numpy as np
import trimesh

from eg3d_rlhf.evaluation.attribution import attribution_report as report
from eg3d_rlhf.evaluation.attribution.attribution_report import PAGE
from eg3d_rlhf.evaluation.attribution.attribution_study import Study
from eg3d_rlhf.evaluation.attribution.settings import Settings
from eg3d_rlhf.evaluation.comparison import Comparison
from eg3d_rlhf.experiments import pages
from eg3d_rlhf.experiments.pages import ColouredMesh, Layer, mesh_page, write_page
from eg3d_rlhf.modes import reports


def ball() -> str:
    """A page with a coloured ball."""
    found = trimesh.creation.icosphere(subdivisions=2, radius=0.3)
    colours = np.full((len(found.vertices), 3), 200, dtype=np.uint8)
    layers = [Layer(name="shape alone", colours=colours, legend=())]
    mesh = ColouredMesh(
        name="ball", vertices=np.asarray(found.vertices), faces=np.asarray(found.faces), layers=layers
    )
    return mesh_page([mesh], "Attribution on the surface")


def attribution_page(c: Comparison, out: Path) -> Path:
    """Write the report of two latents; returns the page."""
    settings = Settings(
        method="permutation", permutations=2, steps=4, randomisations=2, checked=1, gap_bound=1.0
    )
    study = Study(dataclasses.replace(c, n=2, memory={}), settings)
    parts = report.jobs(study)
    findings = pages.run(parts, out, quiet=True)
    surface = out / "data" / PAGE
    if not surface.stat().st_size:
        surface.write_text(ball())
    words = reports.attribution_summary(findings)
    introduction = reports.attribution_introduction(study)
    return write_page(
        out / "index.html", report.TITLE, introduction, parts, findings, words, reports.viewer(out)
    )
