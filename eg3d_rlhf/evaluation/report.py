"""The evaluation report: which parts it has, what it says first, and what its figures cannot say."""

from collections.abc import Mapping, Sequence

from eg3d_rlhf.evaluation import canonical_depth, geometry, images, overoptimisation, rewards, strips
from eg3d_rlhf.evaluation.comparison import Comparison, settings_of
from eg3d_rlhf.metrics.features import load_features
from eg3d_rlhf.metrics.image_similarity import load_identity, load_lpips
from eg3d_rlhf.reports.jobs import Finding, Job
from eg3d_rlhf.settings import control_differs

MODULES = (rewards, images, geometry, overoptimisation, canonical_depth, strips)
TITLE = "Before and after tuning"


def all_jobs(c: Comparison) -> list[Job]:
    """Every part of the report."""
    return [job for module in MODULES for job in module.jobs(c)]


def select(jobs: Sequence[Job], keys: str | None) -> list[Job]:
    """The jobs of a comma-separated list of keys, in the report's order; all for None. Raises: ValueError for an unknown key."""
    if keys is None:
        return list(jobs)
    wanted = [key.strip() for key in keys.split(",") if key.strip()]
    known = [job.key for job in jobs]
    unknown = [key for key in wanted if key not in known]
    if unknown or not wanted:
        raise ValueError(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown) or 'nothing'}. Correct the list.")
    return [job for job in jobs if job.key in wanted]


def check_files(c: Comparison) -> None:
    """Open the networks that the user names before minutes of work depend on them. Raises: ValueError."""
    if c.inception is not None:
        load_features(c.inception, c.device)
    if c.lpips is not None:
        load_lpips(c.lpips, c.device)
    if c.identity is not None:
        load_identity(c.identity, c.device)


def introduction(c: Comparison) -> str:
    """What is compared, in a paragraph."""
    runs_of = {"after": c.run, "control": c.control_run}
    named = []
    for role, generator in c.generators().items():
        run = runs_of.get(role)
        named.append(f"{role} {generator.path.name}" + (f" of {run.name}" if run is not None else ""))
    return (
        f"The same held-out latents through each generator: {', '.join(named)}{'; no control' if c.control is None else ''}. Every figure "
        "states its latents, networks and interval; its data can be downloaded below it."
    )


def summary(c: Comparison, findings: Mapping[str, Finding]) -> list[str]:
    """What the numbers allow, then what they do not."""
    return [f"Allowed: {text}" for text in _allowed(findings)] + [f"Not allowed: {text}" for text in _not_allowed(c, findings)]


def _data(findings: Mapping[str, Finding], key: str) -> dict:
    found = findings.get(key)
    return {} if found is None or "absent" in found.data else dict(found.data)


def _allowed(findings: Mapping[str, Finding]) -> list[str]:
    says = []
    paired = _data(findings, "reward-shift").get("paired", {})
    if paired and paired["after"]["mean_lo"] > 0:
        alone = "control" in paired and abs(paired["control"]["mean"]) < 0.1 * paired["after"]["mean"]
        cause = "; the control moved by less than a tenth of that, so the reward phase did it" if alone else ""
        says.append(f"the optimised reward rose, by {paired['after']['mean']:.2f} on average{cause}.")
    curves = _data(findings, "over-optimisation").get("curves", {})
    for name, curve in curves.items():
        if name != overoptimisation.PROXY and curve["steps"][-1]["lo"] > 0:
            end = "though it has passed its peak" if curve["divergence"] is not None else "without a point of divergence"
            part = "whose noisy answers the labels are" if name == overoptimisation.JUDGE else "which took no part in tuning"
            says.append(f"the {name}, {part}, rose too ({curve['steps'][-1]['mean']:+.2f} deviations), {end}.")
    for change in _data(findings, "image-distances").get("changes", []):
        if change["role"] == "after" and not change["lo"] <= 0 <= change["hi"]:
            says.append(f"images moved {'away from' if change['lo'] > 0 else 'towards'} the data ({change['distance']} distance).")
    for row in _data(findings, "diversity").get("rows", []):
        if row["role"] == "after" and (row["ratio_hi"] < 1 or row["ratio_lo"] > 1):
            kind = "less" if row["ratio_hi"] < 1 else "more"
            says.append(f"{row['of']} of different latents are {kind} diverse ({row['ratio']:.2f} times).")
    return says or ["nothing: no selected part shows a change whose interval excludes none."]


def _not_allowed(c: Comparison, findings: Mapping[str, Finding]) -> list[str]:
    says = ["that people prefer the tuned shapes: nobody was asked here. Compare them blind."]
    says.append("any statement on other training seeds: there is one run for each setting, and intervals run over latents.")
    if c.control is None:
        says.append("the cause of a change: without a control, further training alone may have made it.")
    elif c.run and c.control_run and (other := control_differs(settings_of(c.run), settings_of(c.control_run))):
        says.append(f"a clean comparison with the control: its run also differs in {', '.join(other)}.")
    if c.held_out is None or c.held_out.provenance.get("labels") == c.reward.provenance.get("labels"):
        says.append("freedom from over-optimisation in general: " + (
            "there is no second reward." if c.held_out is None else "the second reward learnt from the same labels as the first."))
    if c.synthetic:
        says.append("anything on photographs of people: these are rendered heads, and the judge is a formula.")
    missing = [key for key, finding in findings.items() if "absent" in finding.data]
    if missing:
        says.append(f"what these parts would say, which could not be made (each says why): {', '.join(missing)}.")
    return says
