"""Rewards of finished assets from another process: a reward server, or a vision-language model as a judge.

    --reward=http://HOST/score   the mean of the values that a reward server returns (rewards/score_server.py)
    --reward=judge:URL           the mean over criteria of P(the sample is better than a reference asset);
                                 the reference is an asset of the untuned generator for the same prompt

Samples are written to temporary files in the form that people look at, and rendered by the rig of judges with
fewer pixels. An asset that cannot be rendered, such as an empty one, gets the lowest score: 0 from a judge,
and the lowest score of the other samples from a server. If a server gives no score for another reason, the
reward is neutral: 1/2 from a judge, and the mean of the other samples from a server. With --reward-required
the run ends instead.

Shapes: N assets.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.geometry.files.model import Model, glb_parts
from eg3d_rlhf.people.judge.judge import Judge, JudgedPair, MemoryRenders
from eg3d_rlhf.people.judge.renders import montages_of
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import JudgeSettings, parse_questions
from eg3d_rlhf.people.judge.view_maps import model_maps, splat_maps
from eg3d_rlhf.people.label.assets.reading import read_asset
from eg3d_rlhf.rewards.score_server import ScoredAsset, ScoreServer
from eg3d_rlhf.tuning.flow.base.family import FlowFamily, Shows
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import generate
from eg3d_rlhf.tuning.flow.training.online.settings import JUDGE_PREFIX, ServedConfig
from training.phases import derive_seed

_REFERENCE_TRIES = 8  # seeds that are tried until an untuned asset of a prompt can be rendered
_NEUTRAL = 0.5  # probability of a pair without a readable verdict


@dataclass(frozen=True, kw_only=True)
class ShownAsset:
    """An asset as a server is shown it."""

    id: str  # SHA-256 of the file that people would look at
    renders: MemoryRenders
    mesh: bytes | None  # GLB file; None for splats


@dataclass(frozen=True, kw_only=True)
class Presenter:
    """Renders samples of a family of generators."""

    family: FlowFamily
    rig: Rig

    def show(self, asset: Any) -> ShownAsset | None:
        """Render an asset; None if it has no surface that could be rendered."""
        assert isinstance(self.family, Shows), "check_served rejects other families"
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = self.family.show(asset, Path(folder) / "asset")
                asset_id = file_hash(path)
                model = read_asset(path)
                maps = (
                    model_maps(model, self.rig, self.family.up)
                    if isinstance(model, Model)
                    else splat_maps(model, self.rig, self.family.up)
                )
            # An empty asset has no triangles, or no points, of which a bounding box could be computed.
            except (ValueError, IndexError):
                return None
            mesh = b"".join(glb_parts(model)) if isinstance(model, Model) else None
            return ShownAsset(
                id=asset_id,
                renders=MemoryRenders(montages_of(maps, self.rig)),
                mesh=mesh,
            )


@dataclass(kw_only=True)
class ServerReward:
    """An `AssetReward` from a reward server."""

    server: ScoreServer
    presenter: Presenter
    required: bool = False  # True: an asset without a score ends the run
    print_line: Callable[[str], None] = field(default=lambda line: print(line, flush=True))
    _is_announced: bool = False
    _announced_failures: int = 0

    def __call__(self, assets: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        """Return the scores of N assets, [N] float32.

        Raises: ValueError if the server rejects the requests, or with `required` if an asset has no score.
        """
        shown_assets = [self.presenter.show(asset) for asset in assets]
        requests = [
            ScoredAsset(
                id=shown.id,
                prompt=prompt,
                images=[*shown.renders.images("textured"), *shown.renders.images("shaded")],
                mesh=shown.mesh,
            )
            for shown, prompt in zip(shown_assets, prompts, strict=True)
            if shown is not None
        ]
        if requests and not self._is_announced:
            self._is_announced = True
            sent_bytes = sum(len(image) for image in requests[0].images) + len(requests[0].mesh or b"")
            self.print_line(
                f"sending to {self.server.url}: the prompt, {len(requests[0].images)} montages of renders"
                f" and the mesh of every sample ({sent_bytes / 1e6:.2f} MB each)"
            )
        answers = iter(self.server.score(requests))
        scores = [None if shown is None else next(answers) for shown in shown_assets]
        means = [None if named is None else sum(named.values()) / len(named) for named in scores]
        known = [value for value in means if value is not None]
        failed_count = sum(
            value is None and shown is not None for value, shown in zip(means, shown_assets, strict=True)
        )
        if failed_count and (self.required or not known):
            raise ValueError(
                f"--reward={self.server.url}: {failed_count} of {len(assets)} samples got no score"
                f" ({self.server.last_failure}). Check the server; the run resumes with --resume."
            )
        if self.server.failed > self._announced_failures:
            self._announced_failures = self.server.failed
            self.print_line(f"Warning: {self.server.line()}. They get the mean score of the other samples.")
        lowest = min(known, default=0.0)
        neutral = sum(known) / len(known) if known else 0.0
        return torch.tensor(
            [
                value if value is not None else lowest if shown is None else neutral
                for value, shown in zip(means, shown_assets, strict=True)
            ],
            dtype=torch.float32,
        )


@dataclass(kw_only=True)
class JudgeReward:
    """An `AssetReward` in 0..1 by a judge that compares each sample with an untuned asset of its prompt."""

    settings: JudgeSettings
    problem: Problem
    presenter: Presenter
    required: bool = False  # True: a sample without a readable verdict ends the run
    print_line: Callable[[str], None] = field(default=lambda line: print(line, flush=True))
    _judge: Judge | None = None
    _references: dict[str, ShownAsset] = field(default_factory=dict)  # by prompt
    _is_limit_announced: bool = False

    def __call__(self, assets: Sequence[Any], prompts: Sequence[str]) -> torch.Tensor:
        """Return the mean over criteria of P(better than the reference) of N assets, [N] float32.

        Raises: ValueError if the server rejects the requests, or with `required` if a verdict is missing.
        """
        if self._judge is None:
            self._judge = Judge(self.settings, self._echo)
            # Calls of an interrupted run count towards the limit.
            self._judge.counts.calls = len(self._judge.answers)
            self.print_line(
                f"judge {self.settings.model} at {self.settings.url}: {2 * len(self.settings.questions)}"
                " calls per sample, each with renders of two assets and the prompt; at most"
                f" {self.settings.limit}"
            )
        shown_assets = [self.presenter.show(asset) for asset in assets]
        pairs = [
            JudgedPair(key=str(i), first=shown.renders, second=self._reference(prompt).renders, prompt=prompt)
            for i, (shown, prompt) in enumerate(zip(shown_assets, prompts, strict=True))
            if shown is not None
        ]
        probabilities: dict[int, list[float]] = {}
        missing_count = 0
        for verdict in self._judge.compare(pairs) if pairs else []:
            probability = verdict.probability
            missing_count += probability is None
            probabilities.setdefault(int(verdict.pair), []).append(
                _NEUTRAL if probability is None else probability
            )
        if missing_count and self.required:
            raise ValueError(
                f"--reward={JUDGE_PREFIX}{self.settings.url}: {missing_count} verdicts are missing"
                f" ({self._judge.counts.line()}). Raise --judge-limit, or remove --reward-required."
            )
        if self._judge.counts.limit_reached and not self._is_limit_announced:
            self._is_limit_announced = True
            self.print_line(
                f"Warning: the limit of {self.settings.limit} calls of the judge is reached. All further"
                " samples get the reward 1/2, so nothing more is learnt. Begin a run with a larger"
                " --judge-limit."
            )
        return torch.tensor(
            [
                0.0 if shown is None else sum(probabilities[i]) / len(probabilities[i])
                for i, shown in enumerate(shown_assets)
            ],
            dtype=torch.float32,
        )

    def _reference(self, prompt: str) -> ShownAsset:
        """Return an untuned asset of a prompt, which is generated once.

        Raises: ValueError if none of several seeds gives an asset that can be rendered.
        """
        for try_number in range(_REFERENCE_TRIES):
            if prompt in self._references:
                break
            # the seed depends on the prompt alone, so that every process has the same reference
            seed = derive_seed("judge reference", prompt, try_number) % 2**31
            (asset,) = generate(self.problem.pipeline, [prompt], [seed])
            if (shown := self.presenter.show(asset)) is not None:
                self._references[prompt] = shown
        if prompt not in self._references:
            raise ValueError(
                f"--reward={JUDGE_PREFIX}...: none of {_REFERENCE_TRIES} untuned assets of the prompt"
                f" {prompt!r} can be rendered, so samples cannot be compared with one. Remove this"
                " prompt."
            )
        return self._references[prompt]

    def _echo(self, line: str) -> None:
        """Print warnings. What each sample sends is announced once."""
        if line.startswith("Warning"):
            self.print_line(line)


def served_reward(name: str, problem: Problem, config: ServedConfig) -> ServerReward | JudgeReward:
    """Make the reward that an address names.

    Args:
        name: "http://..." or "https://..." for a reward server, or JUDGE_PREFIX and an address for a judge.
        problem: problem with the generator and its family.
        config: settings of the server.

    Raises: ValueError for a family whose assets cannot be shown, or for settings that are missing.
    """
    family = problem.family
    if family is None or not isinstance(family, Shows):
        raise ValueError(
            f"--reward={name}: assets of this generator cannot be written to files, which a server needs. Use"
            " another reward."
        )
    presenter = Presenter(family=family, rig=Rig(resolution=config.reward_resolution))
    if not name.startswith(JUDGE_PREFIX):
        return ServerReward(
            server=ScoreServer(url=name, timeout=config.reward_timeout),
            presenter=presenter,
            required=config.reward_required,
        )
    assert config.judge_model is not None and config.judge_limit is not None, (
        "`ServedConfig.check` rejects it"
    )
    settings = JudgeSettings(
        url=name.removeprefix(JUDGE_PREFIX),
        model=config.judge_model,
        limit=config.judge_limit,
        questions=parse_questions(config.judge_criteria),
        answers=None if config.answers is None else Path(config.answers),
        timeout=config.reward_timeout,
    )
    return JudgeReward(
        settings=settings, problem=problem, presenter=presenter, required=config.reward_required
    )
