"""Controlled study of the bundled heads: tuning by labels against cheaper arms and controls.

Each arm has several training seeds.

The study tests whether tuning by labels reduces the errors of heads more than arms without useful labels do.
An arm is one treatment of the generator, see `ARMS` in evaluation/settings.py. Run the study with `make
controlled-study`. Its steps are: label pairs, train rewards, tune the generator, measure the shapes of
held-out latents, and write controlled-study.json, .md and .png.

    plan.py          arms, seeds and label sets, and the commands that make labels, rewards and networks
    measurements.py  shapes of every arm on the held-out latents
    results.py       metrics of the arms, and the pre-registered criterion
    output.py        table and figure
    study.py         all steps in their order

The primary endpoints were pre-registered on 24 November 2026, before any run of the study and after a trial:
docs/lab-book/2026-11-heads.md. The arms that were added later take no part in the criterion.
Shapes: S training seeds, N latents, Q features, n grid points per edge.
"""
