"""Inputs of every report: a generator before and after tuning, with the control run, the rewards and the
latents.

Letters: N latents, L num_ws, W w_dim, D, H, W grid points.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash, naming
from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.seeds import LATENTS, HeldOut
from eg3d_rlhf.evaluation.comparison_sources import Sampling, Sources
from eg3d_rlhf.experiments.pages import Facts, Finding, Job, seed_range
from eg3d_rlhf.experiments.run import OPTIONS, recorded
from eg3d_rlhf.generators import LoadedGenerator, find_network, load_generator, ws_of_seeds
from eg3d_rlhf.preferences.synthetic import names_people
from eg3d_rlhf.rewards.observations import Observation
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
from eg3d_rlhf.tuning.gan.settings import control_differs
from training.heads import people
from training.storage import read_meta


@dataclass(frozen=True, kw_only=True)
class Comparison(Sampling):
    """Loaded networks and settings that all parts of a report share."""

    before: LoadedGenerator
    after: LoadedGenerator  # the tuned generator
    control: LoadedGenerator | None = None  # tuned with lambda_r = 0
    run: Path | None = None  # folder of the tuning run, with network-snapshot-*
    control_run: Path | None = None  # folder of the control's run
    reward: Reward  # the tuning reward
    reward_hash: str = ""  # SHA-256 of the reward's file
    held_out: Reward | None = None  # second reward, never used in tuning
    held_out_hash: str = ""  # SHA-256 of its file; '' without one
    data: str  # dataset as in train.py --data; '' if none is known
    mirror: bool = False  # True if the run doubled the data by mirroring
    # cache of scores and features: several parts use the same ones
    memory: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def synthetic(self) -> bool:
        """Return True if the samples are of the synthetic family, which the simulated annotator can score."""
        return self.data.startswith("synthetic:") and names_people(self.before.generator)

    @property
    def of_people(self) -> bool:
        """Return True if each latent has a ground-truth head."""
        return self.synthetic and self.before.generator.z_dim == people.LATENT

    def generators(self) -> dict[str, LoadedGenerator]:
        """Return the generators by role: 'before', 'after', and 'control' if there is one."""
        pair = {"before": self.before, "after": self.after}  # a report always has these two
        return pair if self.control is None else {**pair, "control": self.control}

    def networks(self, *roles: str) -> dict[str, str]:
        """Return the hash of each of `roles`, or of all generators and rewards."""
        hashes = {role: generator.hash for role, generator in self.generators().items()} | {
            "reward": self.reward_hash
        }
        # Roles that this comparison lacks, such as a control, are left out.
        if self.held_out is not None:
            hashes["held-out"] = self.held_out_hash
        return {role: hashes[role] for role in roles or hashes if role in hashes}

    def snapshots(self, role: str) -> list[tuple[float, Path]]:
        """Return (kimg, file) of the snapshots of the run that made 'after' or 'control'; [] without a
        run.
        """
        return snapshots({"after": self.run, "control": self.control_run}[role])

    def load(self, path: Path) -> LoadedGenerator:
        """Load a network file onto the comparison's device."""
        return load_generator(path, self.device)

    def seeds(self, n: int | None = None, of: HeldOut = LATENTS) -> range:
        """Return the first n held-out seeds (default: self.n) of a range, shifted by --seed."""
        return of.take(self.n if n is None else n, self.seed)

    def ws(self, generator: LoadedGenerator, seeds: Sequence[int], psi: float | None = None) -> torch.Tensor:
        """Compute ws [N, L, W] of seeds at the comparison's truncation, or at another."""
        return ws_of_seeds(generator.generator, list(seeds), truncation_psi=self.psi if psi is None else psi)

    def fields(
        self,
        generator: LoadedGenerator,
        seeds: Sequence[int],
        psi: float | None = None,
        batch: int | None = None,
    ) -> Iterator[Field]:
        """Yield the shapes of seeds, at most `batch` (default: the comparison's) in a field."""
        for part in self.ws(generator, seeds, psi).split(batch or self.batch):
            # Not around the yield: the caller would run without gradients, too.
            with torch.no_grad():
                shapes = generator.generator.field(part)
            yield shapes

    @torch.no_grad()
    def observed(self, generator: LoadedGenerator, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield batches [<= batch, ...] of the reward's input for seeds."""
        for field in self.fields(generator, seeds):
            yield self.reward.observation.observe(field)

    @torch.no_grad()
    def scores(
        self,
        generator: LoadedGenerator,
        seeds: Sequence[int],
        psi: float | None = None,
        held_out: bool = False,
    ) -> torch.Tensor:
        """Compute scores [N] of seeds on the CPU by the reward, or by the second one, and cache them.

        Raises: ValueError if the second reward is requested and there is none.
        """
        if held_out and self.held_out is None:
            raise ValueError(
                "Comparison.scores: expected a second reward, got none. Name one with --heldout-reward."
            )
        sample_key = (generator.hash, tuple(seeds), self.psi if psi is None else psi)
        requested = (self.held_out_hash if held_out else self.reward_hash, *sample_key)
        if requested not in self.memory:
            # Both rewards are scored in one pass, so that each shape is generated once.
            rewards = {self.reward_hash: self.reward} | (
                {} if self.held_out is None else {self.held_out_hash: self.held_out}
            )
            parts_by_reward: dict[str, list[torch.Tensor]] = {digest: [] for digest in rewards}
            for field in self.fields(generator, seeds, psi):
                seen: dict[Observation, torch.Tensor] = {}  # an input that both rewards read is computed once
                for digest, reward in rewards.items():
                    kind = reward.observation
                    if kind not in seen:
                        seen[kind] = kind.observe(field)
                    parts_by_reward[digest].append(reward.score_observed(seen[kind]).cpu())
            self.memory.update(
                {(digest, *sample_key): torch.cat(parts) for digest, parts in parts_by_reward.items()}
            )
        return self.memory[requested]

    def facts(self, seeds: Sequence[int], roles: Sequence[str] = (), interval: str = "", **more) -> Facts:
        """Return the facts that a figure states: latents, truncation, networks and interval; `more` overrides
        them.
        """
        facts = {
            "n": len(seeds),
            "seeds": seed_range(seeds),
            "psi": self.psi,
            "networks": self.networks(*roles),
            "interval": interval,
        }
        return Facts(**{**facts, **more})

    def inputs(self, *roles: str, **more) -> Mapping:
        """Return the inputs of a job: hashes of `roles` (default: all), truncation, seed, device, and `more`.

        A job is computed again if any of them changes.
        """
        return {
            "networks": self.networks(*roles),
            "psi": self.psi,
            "seed": self.seed,
            # The type alone: the index of the GPU is no input.
            "device": self.device.type,
            **more,
        }

    def resolved(self) -> dict:
        """Return the resolved networks and settings as JSON values, for --dry-run."""
        files = {
            role: {"file": str(generator.path), "hash": generator.hash}
            for role, generator in self.generators().items()
        }
        return {
            **files,
            "reward": self.reward_hash,
            "data": self.data,
            "psi": self.psi,
            "n": self.n,
            "batch": self.batch,
            "seed": self.seed,
            "device": str(self.device),
        }

    def job(
        self,
        key: str,
        title: str,
        compute: Callable[["Comparison", Path], Finding],
        plots: Mapping[str, Callable] | None = None,
        roles: Sequence[str] = (),
        version: int = 1,
        **more,
    ) -> Job:
        """Return a part of a report that depends on the networks of `roles` (default: all) and on `more`."""
        return Job(
            key=key,
            title=title,
            compute=partial(compute, self),
            plots=plots or {},
            version=version,
            inputs=self.inputs(*roles, **more),
        )

    def absent(self, key: str, title: str, why: str) -> Job:
        """Return a part without figures that explains why it is missing, and how to get it."""
        finding = Finding(facts=Facts(n=0, networks=self.networks()), data={"absent": why}, says=[why])
        return Job(
            key=key, title=title, compute=lambda folder: finding, inputs={"absent": why, **self.inputs()}
        )


def load_comparison(s: Sources) -> Comparison:
    """Load everything that the sources name, and find the defaults of what they leave out.

    Raises: FileNotFoundError, ValueError naming the flag.
    """
    with naming("--before"):
        before_path = find_network(s.before)
    run = _run(s, before_path)
    with naming("--after" if s.after is not None else "--run"):
        # A named file wins over the run's newest snapshot.
        after_path = find_network(s.after or run)
    control_path = s.control or newest_control(s.runs_folder, run)
    networks: dict[str, Any] = {}  # role -> loaded generator
    for role, path in (("before", before_path), ("after", after_path), ("control", control_path)):
        if path is not None:
            with naming(f"--{role}"):
                networks[role] = load_generator(path, s.device)
                # Checked at once: a wrong pair should fail before the rewards are loaded.
                _check_pair(networks["before"], networks[role])
    before = networks["before"]  # the reference of all checks
    reward_path = _reward_path(s, run, before)
    with naming("--reward-ckpt"):
        reward = load_reward(reward_path, s.device)
    check_reward(reward, before.generator, "--reward-ckpt")
    held_out, held_out_hash = _held_out(s, run, reward_path)
    if held_out is not None:
        check_reward(held_out, before.generator, "--heldout-reward")
    for flag, file in (("--lpips", s.lpips), ("--identity", s.identity), ("--inception", s.inception)):
        if file is not None and not Path(file).is_file():
            raise ValueError(f"{flag}: expected a file, got nothing at {file}. Check the path.")
    used = settings_of(run)  # {} without a run
    data = used.get("data") or (bundled.DATA if before_path == bundled.GENERATOR else "")
    return Comparison(
        **networks,
        run=run,
        control_run=_folder(control_path),
        reward=reward,
        reward_hash=file_hash(reward_path),
        held_out=held_out,
        held_out_hash=held_out_hash,
        data=s.data if s.data is not None else str(data),
        mirror=bool(used.get("mirror", False)),
        **{field.name: getattr(s, field.name) for field in dataclasses.fields(Sampling)},
    )


def _folder(path: Path | None) -> Path | None:
    """Return the run folder that a path names or lies in; None if it is not in a run folder."""
    if path is None:
        return None
    folder = path if path.is_dir() else path.parent  # a file names its folder
    return folder if settings_of(folder) or path.is_dir() else None


def _run(s: Sources, before: Path) -> Path | None:
    """Find the tuning run: the named one, the one of `after`, or the newest that began from `before`."""
    if s.run is not None:
        if not s.run.is_dir():
            raise ValueError(f"--run: expected a run folder, got nothing at {s.run}. Check the path.")
        return s.run
    if s.after is not None:
        return _folder(s.after)
    known = ((run, recorded(run)) for run in _runs(s.runs_folder))
    init = file_hash(before)  # a run records the hash of the network that it began from
    newest = next(
        # lambda_r = 0 is a control, not a tuning run.
        (
            run
            for run, settings in known
            if settings["lambda_r"] > 0 and settings.get("hashes", {}).get("init") == init
        ),
        None,
    )
    if newest is None:
        raise ValueError(
            f"--after: expected a tuned network, got none, and no run in {s.runs_folder}/ began from"
            f" {before.name}. Run `make demo` first, or give --after=FILE or --run=DIR."
        )
    return newest


def _check_pair(before: LoadedGenerator, other: LoadedGenerator) -> None:
    """Raise ValueError unless latents and the cube have the same meaning for both generators."""
    expected, got = (
        {"z_dim": g.z_dim, "images": g.img_resolution, "side": g.bounds.side, "centre": g.bounds.centre}
        for g in (before.generator, other.generator)
    )
    if expected != got:
        text = f"expected a generator like {before.path.name} {expected}, got {other.path.name} {got}"
        raise ValueError(f"{text}. Compare runs of one generator.")


def _reward_path(s: Sources, run: Path | None, before: LoadedGenerator) -> Path:
    """Return the reward's file: the named one, the run's if that file is unchanged, or the bundled one.

    The bundled reward is a default for the bundled generator only.
    """
    if s.reward_ckpt is not None:
        return s.reward_ckpt
    settings = settings_of(run)
    used = settings.get("reward_ckpt")  # path at the time of the run
    digest = settings.get("hashes", {}).get("reward")  # SHA-256 of the file at the time of the run
    if digest == file_hash(bundled.REWARD):
        return bundled.REWARD
    # The run records no reward, for example a run of other code.
    if used is None or digest is None:
        if before.hash == load_reward(bundled.REWARD).provenance["generator"]:
            return bundled.REWARD
        raise ValueError(
            f"--reward-ckpt: expected a reward of {before.path.name}, got none. The bundled reward covers"
            " only the bundled generator. Give a file."
        )
    # The path may hold another file by now: its hash decides.
    if not Path(used).is_file() or file_hash(used) != digest:
        raise ValueError(
            f"--reward-ckpt: expected the run's reward ({digest[:12]}) at {used}, got another file or none."
            " Name the file."
        )
    return Path(used)


def _held_out(s: Sources, run: Path | None, reward: Path) -> tuple[Reward | None, str]:
    """Load the second reward with its hash: the named one, the held-out reward of the run, or the bundled
    one.

    The bundled one is the default if the first reward is the bundled one. Returns (None, '') if there is
    none.
    """
    path = s.heldout_reward
    digest = file_hash(reward)  # the first reward's
    settings = settings_of(run)
    used = settings.get("heldout_reward")  # path at the time of the run
    # The recorded path counts only if the file is unchanged.
    if (
        path is None
        and used
        and Path(used).is_file()
        and file_hash(used) == settings.get("hashes", {}).get("heldout")
    ):
        path = Path(used)
    elif path is None and digest == file_hash(bundled.REWARD) and bundled.WATCH.exists():
        path = bundled.WATCH
    if path is None:
        return None, ""
    with naming("--heldout-reward"):
        second = load_reward(path, s.device)
        # A reward cannot be its own held-out evaluator.
        if file_hash(path) == digest:
            raise ValueError(
                f"expected another reward than the tuning reward, got the same file {path}. Train one on"
                " other labels."
            )
    return second, file_hash(path)


# Runs, as recorded in their folders.


def settings_of(run: Path | None) -> dict:
    """Read the settings that train.py recorded in a run folder; {} if there are none."""
    return {} if run is None else recorded(run)


def judged_by_annotator(generator: LoadedGenerator, data: str | None) -> bool:
    """Return True if the simulated annotator can score the generator's samples.

    This needs latents with ground-truth heads of people and the synthetic data: --data, the run's record, or
    the bundled generator's.
    """
    if data is None:
        folder = generator.path.parent  # the run that wrote the generator
        data = (
            bundled.DATA
            if generator.path == bundled.GENERATOR
            else str(settings_of(folder).get("data") or "")
        )
    return data.startswith("synthetic:") and names_people(generator.generator)


def snapshots(run: Path | None) -> list[tuple[float, Path]]:
    """Return (kimg, file) of a run's network snapshots in the order of training; [] without a run."""
    if run is None:
        return []
    kimg_files = [
        (read_meta(path, "network")["cur_nimg"] / 1000, path)
        for path in run.glob("network-snapshot-*.safetensors")
    ]
    # Runs of EG3D's own code: their pickles record the training length in their names only.
    for path in [] if kimg_files else sorted(run.glob("network-snapshot-*.pkl")):
        if (name := re.match(r"network-snapshot-(\d{6})", path.name)) is None:
            raise ValueError(f"{path}: expected network-snapshot-<kimg>.pkl, got another name. Rename it.")
        kimg_files.append((float(name.group(1)), path))
    return sorted(kimg_files)


def _runs(folder: Path) -> list[Path]:
    """List the run folders with a snapshot and a recorded reward, newest first."""
    runs = [
        run
        for run in folder.glob("*")
        if recorded(run).get("reward") == "sigma" and any(run.glob("network-snapshot-*"))
    ]
    return sorted(runs, key=lambda run: (run / OPTIONS).stat().st_mtime, reverse=True)


def newest_control(folder: Path, tuned: Path | None) -> Path | None:
    """Find the newest run in `folder` that is the control of `tuned`: lambda_r = 0, and equal in everything
    else that the result depends on.
    """
    if not settings_of(tuned):
        return None
    return next(
        (run for run in _runs(folder) if not control_differs(settings_of(tuned), recorded(run))), None
    )
