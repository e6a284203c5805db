"""The evaluation report: which parts it has, what it says first, and what its figures cannot say."""

from collections.abc import Mapping

from eg3d_rlhf.evaluation import geometry, images, overoptimisation, rewards, strips
from eg3d_rlhf.evaluation.comparison import Comparison, settings_of
from eg3d_rlhf.experiments.jobs import Finding, Job
from eg3d_rlhf.measures.features import load_features
from eg3d_rlhf.measures.image_similarity import load_identity, load_lpips
from eg3d_rlhf.tuning.gan.settings import control_differs

PARTS = (rewards.jobs, images.jobs, geometry.jobs, overoptimisation.jobs, geometry.depth_jobs, strips.jobs)
TITLE = "Before and after tuning"


def select(c: Comparison, keys: str | None = None) -> list[Job]:
    """The report's parts, or those of a comma-separated list of keys. Raises: ValueError for an unknown key."""
    jobs = [job for part in PARTS for job in part(c)]
    if keys is None:
        return jobs
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
    of = {role: f" of {run.name}" for role, run in (("after", c.run), ("control", c.control_run)) if run is not None}
    named = [f"{role} {generator.path.name}{of.get(role, '')}" for role, generator in c.generators().items()]
    return (
        f"The same held-out latents through each generator: {', '.join(named)}{'; no control' if c.control is None else ''}. Every figure "
        "states its latents, networks and interval; its data can be downloaded below it."
    )


def summary(c: Comparison, findings: Mapping[str, Finding]) -> list[str]:
    """What the numbers allow, then what they do not."""
    return [f"Allowed: {text}" for text in _allowed(findings)] + [f"Not allowed: {text}" for text in _not_allowed(c, findings)]


def _allowed(findings: Mapping[str, Finding]) -> list[str]:
    says = []
    data = {key: finding.data for key, finding in findings.items()}
    paired = data.get("reward-shift", {}).get("paired", {})
    if paired and paired["after"]["mean_lo"] > 0:
        alone = "control" in paired and abs(paired["control"]["mean"]) < 0.1 * paired["after"]["mean"]
        cause = "; the control moved by less than a tenth of that, so the reward phase did it" if alone else ""
        says.append(f"the optimised reward rose, by {paired['after']['mean']:.2f} on average{cause}.")
    for name, curve in data.get("over-optimisation", {}).get("curves", {}).items():
        if name != overoptimisation.PROXY and curve["steps"][-1]["lo"] > 0:
            end = "though it has passed its peak" if curve["divergence"] is not None else "without a point of divergence"
            part = "whose noisy answers the labels are" if name == overoptimisation.JUDGE else "which took no part in tuning"
            says.append(f"the {name}, {part}, rose too ({curve['steps'][-1]['mean']:+.2f} deviations), {end}.")
    for change in data.get("image-distances", {}).get("changes", []):
        if change["role"] == "after" and not change["lo"] <= 0 <= change["hi"]:
            says.append(f"images moved {'away from' if change['lo'] > 0 else 'towards'} the data ({change['distance']} distance).")
    for row in data.get("diversity", {}).get("rows", []):
        if row["role"] == "after" and (row["ratio_hi"] < 1 or row["ratio_lo"] > 1):
            kind = "less" if row["ratio_hi"] < 1 else "more"
            says.append(f"{row['of']} of different latents are {kind} diverse ({row['ratio']:.2f} times).")
    return says or ["nothing: no selected part shows a change whose interval excludes none."]


def _not_allowed(c: Comparison, findings: Mapping[str, Finding]) -> list[str]:
    says = ["that people prefer the tuned shapes: nobody was asked here. Compare them blind.",
            "any statement on other training seeds: there is one run for each setting, and intervals run over latents."]
    if c.control is None:
        says.append("the cause of a change: without a control, further training alone may have made it.")
    elif c.run and c.control_run and (other := control_differs(settings_of(c.run), settings_of(c.control_run))):
        says.append(f"a clean comparison with the control: its run also differs in {', '.join(other)}.")
    if c.held_out is None or c.held_out.labels == c.reward.labels or c.held_out.labels & c.reward.labels:
        says.append("freedom from over-optimisation in general: " + (
            "there is no second reward." if c.held_out is None else "the second reward learnt from the same labels as the first."))
    if c.synthetic:
        says.append("anything on photographs of people: these are rendered heads, and the judge is a formula.")
    missing = [key for key, finding in findings.items() if "absent" in finding.data]
    if missing:
        says.append(f"what these parts would say, which could not be made (each says why): {', '.join(missing)}.")
    return says
