"""Inputs of every report: a generator before and after tuning, the control run, the rewards and the latents.

A role is the part that a network plays in a report: "before" tuning, "after" tuning, or "control", which was
trained in the same way without the reward (lambda_r = 0).
Shapes: N latents, L num_ws, W w_dim.
"""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import file_hash, prefix_errors
from eg3d_rlhf.core.field import LEVEL, Field
from eg3d_rlhf.core.input_paths import check_run_folder, check_torchscript_file
from eg3d_rlhf.core.seeds import LATENTS, HeldOut
from eg3d_rlhf.evaluation.comparison_sources import Sampling, Sources
from eg3d_rlhf.experiments.network_before import network_before
from eg3d_rlhf.experiments.pages import Facts, Finding, Job, seed_range
from eg3d_rlhf.experiments.run import OPTIONS, recorded
from eg3d_rlhf.generators import LoadedGenerator, find_network, load_generator, set_level, ws_of_seeds
from eg3d_rlhf.generators.density_samples import check_density
from eg3d_rlhf.preferences.synthetic import has_ground_truth_heads
from eg3d_rlhf.rewards.observations import Observation
from eg3d_rlhf.rewards.reward import Reward, check_reward, load_reward
from eg3d_rlhf.tuning.gan.settings import control_differs
from training.heads import people
from training.storage import read_meta


@dataclass(frozen=True, kw_only=True)
class Comparison(Sampling):
    """Loaded networks and settings of a report, which all of its sections share."""

    before: LoadedGenerator
    after: LoadedGenerator  # the tuned generator
    control: LoadedGenerator | None = None  # tuned with lambda_r = 0
    run: Path | None = None  # folder of the tuning run, with network-snapshot-*
    control_run: Path | None = None  # folder of the control's run
    reward: Reward  # the tuning reward
    reward_hash: str = ""  # SHA-256 of the reward's file
    held_out: Reward | None = None  # held-out reward, which was never used in tuning
    held_out_hash: str = ""  # SHA-256 of the held-out reward's file; '' if there is no such reward
    data: str  # dataset as in train.py --data; '' if no dataset is recorded or named
    mirror: bool = False  # True if the run doubled the data by mirroring
    # cache of scores and features, since several parts of a report need the same ones
    memory: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def synthetic(self) -> bool:
        """Return True if the samples are synthetic heads, which the simulated annotator can score."""
        return self.data.startswith("synthetic:") and has_ground_truth_heads(self.before.generator)

    @property
    def of_people(self) -> bool:
        """Return True if the generator makes synthetic heads, so that each latent has a ground-truth head."""
        return self.synthetic and self.before.generator.z_dim == people.LATENT

    def generators(self) -> dict[str, LoadedGenerator]:
        """Return the generators by role: 'before', 'after', and 'control' if there is a control."""
        generator_by_role = {"before": self.before, "after": self.after}  # a report always has these two
        return generator_by_role if self.control is None else {**generator_by_role, "control": self.control}

    def networks(self, *roles: str) -> dict[str, str]:
        """Return the hashes of networks by role.

        Args: roles: any of 'before', 'after', 'control', 'reward' and 'held-out'. Without roles, all hashes
            are returned. Roles that this comparison lacks are left out.
        """
        hash_by_role = {role: generator.hash for role, generator in self.generators().items()} | {
            "reward": self.reward_hash
        }
        if self.held_out is not None:
            hash_by_role["held-out"] = self.held_out_hash
        return {role: hash_by_role[role] for role in roles or hash_by_role if role in hash_by_role}

    def snapshots(self, role: str) -> list[tuple[float, Path]]:
        """Return (kimg, file) of each snapshot of the run that made a network, in the order of training.

        The list is empty if no run folder is named or recorded.
        Args: role: 'after' or 'control'.
        """
        return snapshots({"after": self.run, "control": self.control_run}[role])

    def load(self, network_path: Path) -> LoadedGenerator:
        """Load a network file onto the comparison's device."""
        return load_generator(network_path, self.device, self.level)

    def warn_without_surface(self) -> None:
        """Print a warning on stderr if samples before or after tuning have no surface at the level."""
        for role in ("before", "after"):
            generator = self.generators()[role].generator
            problem = check_density(generator, None, self.seeds(8), self.psi).problem()
            if problem is not None:
                print(f"Warning: --{role}: {problem}", file=sys.stderr, flush=True)

    def seeds(self, n: int | None = None, held_out_range: HeldOut = LATENTS) -> range:
        """Return the first `n` seeds of a held-out range, shifted by --seed.

        Args:
            n: number of seeds; None selects self.n.
            held_out_range: held-out range from which the seeds are taken.
        """
        return held_out_range.take(self.n if n is None else n, self.seed)

    def ws(self, generator: LoadedGenerator, seeds: Sequence[int], psi: float | None = None) -> torch.Tensor:
        """Compute the latents ws [N, L, W] of seeds.

        Args: psi: truncation; None selects self.psi.
        """
        return ws_of_seeds(generator.generator, list(seeds), truncation_psi=self.psi if psi is None else psi)

    def fields(
        self,
        generator: LoadedGenerator,
        seeds: Sequence[int],
        psi: float | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Field]:
        """Yield the shapes of seeds, several in a field.

        Args:
            psi: truncation; None selects self.psi.
            batch_size: largest number of shapes in a field; None selects self.batch.
        """
        for ws in self.ws(generator, seeds, psi).split(batch_size or self.batch):
            # `no_grad` must not enclose the yield, else the caller's code would run without gradients, too.
            with torch.no_grad():
                field = generator.generator.field(ws)
            yield field

    @torch.no_grad()
    def observed(self, generator: LoadedGenerator, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
        """Yield the input of the reward for seeds, in batches [<= self.batch, ...]."""
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
        """Compute the rewards [N] of the shapes of seeds, on the CPU. They are computed once and cached.

        Args:
            psi: truncation; None selects self.psi.
            held_out: True: score by the held-out reward. False: score by the tuning reward.

        Raises: ValueError if `held_out` is True and there is no held-out reward.
        """
        if held_out and self.held_out is None:
            raise ValueError(
                "Scores by a held-out reward were requested, but there is no held-out reward. Pass the file"
                " of one to --heldout-reward."
            )
        sample_key = (generator.hash, tuple(seeds), self.psi if psi is None else psi)
        requested_key = (self.held_out_hash if held_out else self.reward_hash, *sample_key)
        if requested_key not in self.memory:
            # Both rewards are scored in one pass, so that each shape is generated once.
            reward_by_hash = {self.reward_hash: self.reward} | (
                {} if self.held_out is None else {self.held_out_hash: self.held_out}
            )
            batches_by_reward: dict[str, list[torch.Tensor]] = {digest: [] for digest in reward_by_hash}
            for field in self.fields(generator, seeds, psi):
                # An input that both rewards read is computed once.
                input_by_observation: dict[Observation, torch.Tensor] = {}
                for digest, reward in reward_by_hash.items():
                    observation = reward.observation
                    if observation not in input_by_observation:
                        input_by_observation[observation] = observation.observe(field)
                    batches_by_reward[digest].append(
                        reward.score_observed(input_by_observation[observation]).cpu()
                    )
            self.memory.update(
                {
                    (digest, *sample_key): torch.cat(score_batches)
                    for digest, score_batches in batches_by_reward.items()
                }
            )
        return self.memory[requested_key]

    def facts(
        self, seeds: Sequence[int], roles: Sequence[str] = (), interval: str = "", **overrides
    ) -> Facts:
        """Return the facts that a plot or table states: latents, truncation, networks and interval.

        Args:
            roles: roles whose hashes are stated. Without roles, all hashes are stated.
            interval: description of the intervals.
            overrides: fields of `Facts` that replace the default ones.
        """
        default_facts = {
            "n": len(seeds),
            "seeds": seed_range(seeds),
            "psi": self.psi,
            "networks": self.networks(*roles),
            "interval": interval,
        }
        return Facts(**{**default_facts, **overrides})

    def inputs(self, *roles: str, **more_inputs) -> Mapping:
        """Return all values that a job depends on. The job is computed again if any of them changes.

        Args:
            roles: roles whose hashes are inputs. Without roles, all hashes are inputs.
            more_inputs: further inputs, as JSON values.
        """
        return {
            "networks": self.networks(*roles),
            "psi": self.psi,
            "seed": self.seed,
            # The type alone, since results do not depend on which of several GPUs computes them.
            "device": self.device.type,
            # left out for the usual level, so that earlier results are found
            **({} if self.before.generator.level == LEVEL else {"level": self.before.generator.level}),
            **more_inputs,
        }

    def resolved(self) -> dict:
        """Return, as JSON values for --dry-run, the networks and settings that will be used."""
        file_by_role = {
            role: {"file": str(generator.path), "hash": generator.hash}
            for role, generator in self.generators().items()
        }
        return {
            **file_by_role,
            "reward": self.reward_hash,
            "data": self.data,
            "psi": self.psi,
            "level": self.before.generator.level,
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
        **more_inputs,
    ) -> Job:
        """Return the job of one section of a report.

        Args:
            key: name of the section in files and links.
            title: heading of the section.
            compute: function of the comparison and a folder for images.
            plots: plotting functions by name.
            roles: roles of the networks that the result depends on. Without roles, it depends on all
                networks.
            version: version of the computation; a new one makes stored results invalid.
            more_inputs: further values that the result depends on.
        """
        return Job(
            key=key,
            title=title,
            compute=partial(compute, self),
            plots=plots or {},
            version=version,
            inputs=self.inputs(*roles, **more_inputs),
        )

    def absent(self, key: str, title: str, reason: str) -> Job:
        """Return the job of a section without results.

        Args: reason: sentences that the section shows instead of results: why they are missing, and how to
            get them.
        """
        # `compute` ignores the folder, since there is nothing to compute.
        empty_finding = Finding(
            facts=Facts(n=0, networks=self.networks()), data={"absent": reason}, says=[reason]
        )
        return Job(
            key=key,
            title=title,
            compute=lambda folder: empty_finding,
            inputs={"absent": reason, **self.inputs()},
        )


def load_comparison(sources: Sources) -> Comparison:
    """Load the networks, rewards and data of a comparison.

    A source that is None gets the default that its comment in `Sources` describes.
    Raises: FileNotFoundError or ValueError, with the name of the flag.
    """
    if sources.before is None:
        run_folder = _find_run(sources, None)
        tuned_networks = [path for path in (run_folder, sources.control) if path is not None]
        before_path = network_before(tuned_networks)
        if before_path != bundled.GENERATOR:
            print(f"Before tuning: {before_path}, from which the run began.", file=sys.stderr)
    else:
        with prefix_errors("--before"):
            before_path = find_network(sources.before)
        run_folder = _find_run(sources, before_path)
    with prefix_errors("--after" if sources.after is not None else "--run"):
        # A named file wins over the run's newest snapshot.
        after_path = find_network(sources.after or run_folder)
    control_path = sources.control or newest_control(
        sources.runs_folder, run_folder
    )  # None if there is no control
    generator_by_role: dict[str, Any] = {}  # role -> loaded generator
    for role, network_path in (("before", before_path), ("after", after_path), ("control", control_path)):
        if network_path is not None:
            with prefix_errors(f"--{role}"):
                generator_by_role[role] = load_generator(network_path, sources.device, sources.level)
                # Checked at once, so that networks which do not fit fail before the rewards are loaded.
                _check_pair(generator_by_role["before"], generator_by_role[role])
    _share_level(generator_by_role)
    generator_before = generator_by_role["before"]  # the reference of all checks
    reward_path = _reward_path(sources, run_folder, generator_before)
    with prefix_errors("--reward-ckpt"):
        reward = load_reward(reward_path, sources.device)
    check_reward(reward, generator_before.generator, "--reward-ckpt")
    heldout_reward, heldout_hash = _load_held_out(sources, run_folder, reward_path, reward)
    if heldout_reward is not None:
        check_reward(heldout_reward, generator_before.generator, "--heldout-reward")
    for flag, torchscript_file in (
        ("--lpips", sources.lpips),
        ("--identity", sources.identity),
        ("--inception", sources.inception),
    ):
        if torchscript_file is not None:
            with prefix_errors(flag):
                check_torchscript_file(torchscript_file)
    run_settings = settings_of(run_folder)  # {} without a run
    recorded_data = run_settings.get("data") or (bundled.DATA if before_path == bundled.GENERATOR else "")
    return Comparison(
        **generator_by_role,
        run=run_folder,
        control_run=_find_run_folder(control_path),
        reward=reward,
        reward_hash=file_hash(reward_path),
        held_out=heldout_reward,
        held_out_hash=heldout_hash,
        data=sources.data if sources.data is not None else str(recorded_data),
        mirror=bool(run_settings.get("mirror", False)),
        **{field.name: getattr(sources, field.name) for field in dataclasses.fields(Sampling)},
    )


def _share_level(generator_by_role: Mapping[str, LoadedGenerator]) -> None:
    """Set the level of the tuned network for all networks, if it differs, and print a line on stderr.

    A run that was started with a level stores it in its snapshots, but the network from which it began does
    not have it.

    Args: generator_by_role: generators by role, with the roles before and after.
    """
    tuned_level = generator_by_role["after"].generator.level
    other_roles = [
        role for role, loaded in generator_by_role.items() if loaded.generator.level != tuned_level
    ]
    for role in other_roles:
        with prefix_errors(f"--{role}"):
            set_level(generator_by_role[role].nets, tuned_level)
    if other_roles:
        print(f"Surface level: {tuned_level:g}, the level of the tuned network.", file=sys.stderr)


def _find_run_folder(named_path: Path | None) -> Path | None:
    """Return the run folder that a path names, or in which a named file lies.

    Args: named_path: run folder or network file that the user named; None if the user named nothing.
    Returns: the folder, or None if `named_path` is None or names a file outside a run folder.
    """
    if named_path is None:
        return None
    folder = named_path if named_path.is_dir() else named_path.parent
    # A folder is accepted as it is; the parent of a file counts only if it records the settings of a run.
    return folder if settings_of(folder) or named_path.is_dir() else None


def _find_run(sources: Sources, before_path: Path | None) -> Path | None:
    """Find the folder of the tuning run.

    It is the folder of --run if given, else the folder of --after if given, else the newest run that began
    from the generator before tuning. Return None if --after is a file outside a run folder.

    Args:
        sources: files that the user named.
        before_path: file of the generator before tuning; None: a run that began from any generator.
    """
    if sources.run is not None:
        with prefix_errors("--run"):
            check_run_folder(sources.run)
        return sources.run
    if sources.after is not None:
        return _find_run_folder(sources.after)
    # read one after the other, until a run fits
    runs_with_settings = ((run_folder, recorded(run_folder)) for run_folder in _runs(sources.runs_folder))
    # a run records the hash of the network that it began from
    init_hash = None if before_path is None else file_hash(before_path)
    newest_run = next(
        # lambda_r = 0 is a control, not a tuning run.
        (
            run_folder
            for run_folder, run_settings in runs_with_settings
            if run_settings["lambda_r"] > 0
            and init_hash in (None, run_settings.get("hashes", {}).get("init"))
        ),
        None,
    )
    if newest_run is None:
        condition = "" if before_path is None else f" that began from {before_path.name}"
        raise ValueError(
            f"--after is missing, and {sources.runs_folder}/ has no tuned run{condition}. Run"
            " `make demo` first, or pass a tuned network with --after=FILE or its run with --run=DIR."
        )
    return newest_run


def _check_pair(generator_before: LoadedGenerator, compared_generator: LoadedGenerator) -> None:
    """Raise ValueError unless both generators have the same latent size, image resolution and cube.

    Args:
        generator_before: generator before tuning.
        compared_generator: generator after tuning, or the control.
    """
    # With equal latent sizes, the same seeds give the same latents. With an equal cube, their densities can
    # be compared at the same points.
    properties_before, compared_properties = (
        {
            "latent size (z_dim)": generator.z_dim,
            "image resolution": generator.img_resolution,
            "side of the cube": generator.bounds.side,
            "centre of the cube": generator.bounds.centre,
        }
        for generator in (generator_before.generator, compared_generator.generator)
    )
    difference_texts = [
        f"the {property_name} is {compared_properties[property_name]} instead of {property_value}"
        for property_name, property_value in properties_before.items()
        if compared_properties[property_name] != property_value
    ]
    if difference_texts:
        raise ValueError(
            f"{compared_generator.path.name} cannot be compared with the generator before tuning,"
            f" {generator_before.path.name}: {'; '.join(difference_texts)}. Pass a network that was tuned"
            f" from {generator_before.path.name}."
        )


def _reward_path(sources: Sources, run_folder: Path | None, generator_before: LoadedGenerator) -> Path:
    """Return the file of the tuning reward.

    It is the file of --reward-ckpt if given, else the file that the run recorded. If the run recorded no
    reward, it is the bundled reward, which fits the bundled generator only.
    Raises: ValueError if the recorded file was changed or removed, or if the bundled reward does not fit.
    """
    if sources.reward_ckpt is not None:
        return sources.reward_ckpt
    run_settings = settings_of(run_folder)
    recorded_path = run_settings.get("reward_ckpt")  # path at the time of the run
    recorded_hash = run_settings.get("hashes", {}).get("reward")  # SHA-256 of the file at the time of the run
    if recorded_hash == file_hash(bundled.REWARD):
        return bundled.REWARD
    # The run records no reward, for example a run of other code.
    if recorded_path is None or recorded_hash is None:
        if generator_before.hash == load_reward(bundled.REWARD).provenance["generator"]:
            return bundled.REWARD
        record_text = (
            "there is no run that records a reward" if run_folder is None else "the run records no reward"
        )
        raise ValueError(
            f"--reward-ckpt is missing, and {record_text}. The bundled reward was trained for the bundled"
            f" generator, not for {generator_before.path.name}. Pass the file of a reward with --reward-ckpt."
        )
    # The path may hold another file by now: its hash decides.
    if not Path(recorded_path).is_file() or file_hash(recorded_path) != recorded_hash:
        raise ValueError(
            f"--reward-ckpt is missing, and {recorded_path} no longer holds the reward that the run used"
            f" (SHA-256 {recorded_hash[:12]}...). Pass the file of that reward with --reward-ckpt."
        )
    return Path(recorded_path)


def _load_held_out(
    sources: Sources, run_folder: Path | None, reward_path: Path, tuning_reward: Reward
) -> tuple[Reward | None, str]:
    """Load the held-out reward, and return it with the SHA-256 of its file.

    It is the file of --heldout-reward if given, else the held-out reward of the run, else the bundled one if
    the tuning reward is the bundled one. If there is none of these, return (None, '').
    """
    heldout_path = sources.heldout_reward
    tuning_reward_hash = file_hash(reward_path)
    run_settings = settings_of(run_folder)
    recorded_path = run_settings.get("heldout_reward")  # path at the time of the run
    # The recorded path counts only if the file is unchanged.
    if (
        heldout_path is None
        and recorded_path
        and Path(recorded_path).is_file()
        and file_hash(recorded_path) == run_settings.get("hashes", {}).get("heldout")
    ):
        heldout_path = Path(recorded_path)
    elif (
        heldout_path is None
        and tuning_reward_hash == file_hash(bundled.REWARD)
        and bundled.HELDOUT_REWARD.exists()
    ):
        heldout_path = bundled.HELDOUT_REWARD
    if heldout_path is None:
        return None, ""
    with prefix_errors("--heldout-reward"):
        heldout_reward = load_reward(heldout_path, sources.device)
        # A reward cannot be its own held-out evaluator.
        if heldout_reward.shares_network_with(tuning_reward):
            raise ValueError(
                f"{heldout_path} is the tuning reward itself, or shares a network with it, so it cannot be"
                " held out. Pass a reward that was trained on other labels."
            )
    return heldout_reward, file_hash(heldout_path)


# Runs, as recorded in their folders.


def settings_of(run_folder: Path | None) -> dict:
    """Return the settings that train.py recorded in a run folder; {} if there is no folder or no record."""
    return {} if run_folder is None else recorded(run_folder)


def annotator_can_score(generator: LoadedGenerator, dataset: str | None) -> bool:
    """Return True if the simulated annotator can score the generator's samples.

    The annotator needs a generator whose latents have ground-truth heads, and that was trained on synthetic
    data.
    Args: dataset: dataset, as in train.py --data. If it is None, the dataset that the generator's run
        recorded is used, or the bundled dataset for the bundled generator.
    """
    if dataset is None:
        folder = generator.path.parent  # folder of the run that wrote the generator
        dataset = (
            bundled.DATA
            if generator.path == bundled.GENERATOR
            else str(settings_of(folder).get("data") or "")
        )
    return dataset.startswith("synthetic:") and has_ground_truth_heads(generator.generator)


def snapshots(run_folder: Path | None) -> list[tuple[float, Path]]:
    """Return (kimg, file) of each network snapshot of a run, in the order of training; [] if `run_folder` is
    None.

    kimg is the length of training in thousands of images.
    """
    if run_folder is None:
        return []
    kimg_files = [
        (read_meta(snapshot_path, "network")["cur_nimg"] / 1000, snapshot_path)
        for snapshot_path in run_folder.glob("network-snapshot-*.safetensors")
    ]
    # A run has either snapshots of this project, or pickles of EG3D's code.
    # Runs of EG3D's own code: their pickles record the training length in their names only.
    for snapshot_path in [] if kimg_files else sorted(run_folder.glob("network-snapshot-*.pkl")):
        if (name_match := re.match(r"network-snapshot-(\d{6})", snapshot_path.name)) is None:
            raise ValueError(
                f"{snapshot_path}: the name does not state the length of training. Rename the file to"
                " network-snapshot-<six digits of kimg>.pkl, for example network-snapshot-000040.pkl."
            )
        kimg_files.append((float(name_match.group(1)), snapshot_path))
    return sorted(kimg_files)


def _runs(runs_folder: Path) -> list[Path]:
    """List the runs in `runs_folder` that have a snapshot and were made with --reward=sigma, newest first."""
    run_folders = [
        run_folder
        for run_folder in runs_folder.glob("*")
        if recorded(run_folder).get("reward") == "sigma" and any(run_folder.glob("network-snapshot-*"))
    ]
    return sorted(run_folders, key=lambda run_folder: (run_folder / OPTIONS).stat().st_mtime, reverse=True)


def newest_control(runs_folder: Path, tuned_run: Path | None) -> Path | None:
    """Return the newest run in `runs_folder` that is a control of the tuned run, or None if there is none.

    A control has lambda_r = 0, and all other settings that the result depends on equal those of the tuned
    run. None is also returned if the tuned run's settings are not recorded.
    """
    if not settings_of(tuned_run):
        return None
    return next(
        (
            run_folder
            for run_folder in _runs(runs_folder)
            if not control_differs(settings_of(tuned_run), recorded(run_folder))
        ),
        None,
    )
