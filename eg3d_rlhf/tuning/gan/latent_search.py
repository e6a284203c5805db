"""Improve single samples by a reward: gradient ascent on the style vectors of each, with a frozen generator.

The ascent optimises one offset d of w for each sample, which all layers share, by Adam:

    maximise over d:  clip((r(G(ws + d)) - mean) scale, -10, 10) / 10

where r is the reward, and mean and scale standardise its scores on samples of the generator. The reward is a
network and can be over-optimised: after some steps its score still rises while the shape gets worse. Two
rules limit this:

- The gate leaves a sample unchanged whose reward is already above a quantile of the generator's own scores.
- With `steps="auto"`, each sample stops where a held-out reward stops rising, and keeps its best step.

The term of the reward is shared with inversions (eg3d_rlhf.evaluation.inversion.projector). A search with a
gate is a baseline for tuning: it needs no training, but some seconds for every sample.

Shapes: N samples, n samples of a batch, L style vectors of a sample, W = w_dim, T steps.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from eg3d_rlhf.core.field import Field
from eg3d_rlhf.core.seeds import STANDARDISATION
from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.generators import Generator, as_generator, camera, device_of, latents
from eg3d_rlhf.rewards.reward import Reward, check_reward
from eg3d_rlhf.tuning.gan.phase import CUTOFF, Standardised
from eg3d_rlhf.tuning.gan.search_settings import SearchConfig
from training.progress import tqdm

CLIP = 10.0  # largest absolute value of the standardised reward


class Guidance:
    """Frozen reward of a generator's shapes, standardised on samples of this generator.

    Args:
        generator: the untuned generator.
        reward: reward, which must fit the generator (see `check_reward`).
        is_channels_last: True converts the weights of the reward to the layout channels-last, which is
            slightly faster. Only for batches of one shape: for some rewards, the gradient of a larger batch
            was wrong in this layout (PyTorch 2.13 on the CPU; the scores were right).
    """

    @torch.no_grad()
    def __init__(self, generator: Generator, reward: Reward, is_channels_last: bool = False):
        self.reward = reward.eval().requires_grad_(False)
        if is_channels_last:
            self.reward.channels_last()
        # The scores are standardised, so that weights of the reward do not depend on its scale.
        z = latents(STANDARDISATION.seeds, generator.z_dim).to(device_of(generator))
        scores = []  # [n] for each batch
        z_batches = tqdm(z.split(16), desc="scores of the generator", unit="part", leave=False)
        for z_batch in z_batches:
            # psi 1: the scale of the scores is that of the generator's complete distribution.
            ws = generator.mapping(z_batch, camera(generator, n=len(z_batch)), truncation_cutoff=CUTOFF)
            scores.append(self.reward.score(generator.field(ws)))
        self.initial_scores = torch.cat(scores)  # raw scores of the samples of STANDARDISATION
        # The mean and the scale are fixed here. A running
        # estimate would change the objective during the search.
        self.standard = Standardised(self.initial_scores).to(z.device)

    def clipped_reward(self, field: Field) -> tuple[Tensor, Tensor]:
        """Compute the reward's term of a loss, -clip(r, -10, 10) / 10, where r is the standardised reward.

        Differentiable in the field.

        Returns: two tensors: the term [N], and the raw reward [N].
        """
        score = self.reward.score(field)
        return self.term(score), score

    def term(self, score: Tensor) -> Tensor:
        """Return the reward's term of a loss [N] for raw rewards [N]. Differentiable in the rewards."""
        # The gradient of a clipped value is 0, so that an extreme reward is not increased further.
        return -self.standard.shaped(score).clamp(-CLIP, CLIP) / CLIP

    def quantile(self, share: float) -> float:
        """Return a quantile of the raw rewards of the samples on which the reward is standardised."""
        # Raw scores, because the threshold is compared with raw rewards.
        return float(torch.quantile(self.initial_scores.float(), share))


def check_heldout(reward: Reward, heldout_reward: Reward, source: str = "--heldout-reward") -> None:
    """Raise ValueError if a held-out reward is the reward itself, or shares a member with it.

    The search raises the scores of all members of its reward, so such a held-out reward detects nothing.

    Args:
        reward: reward that the search maximises.
        heldout_reward: reward that stops the search.
        source: start of the message, such as a flag.
    """
    if heldout_reward.shares_network_with(reward):
        raise ValueError(
            f"{source}: this reward is the reward of --reward or shares a member with it, so it cannot detect"
            " over-optimisation. Name a reward that was trained with another seed or on other labels."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ascent:
    """Result of the search for N samples, one row for each sample.

    `path` contains the offsets of all steps, so that the result after fewer steps is known, too. Values after
    the last step of a sample are NaN.
    """

    ws_before: Tensor  # style vectors before the search, [N, L, W]
    path: Tensor  # offset of w at each step, [N, T + 1, W]
    rewards: np.ndarray  # raw reward at each step, [N, T + 1]
    heldout: np.ndarray | None  # raw held-out reward at each step, [N, T + 1]; None without one
    steps: np.ndarray  # number of steps that the result has, [N] integers; 0 for a sample that is unchanged
    gated: np.ndarray  # True for samples that the gate left unchanged, [N]
    seconds: float  # time that the search took

    @property
    def ws(self) -> Tensor:
        """Return the style vectors of the results, [N, L, W]."""
        return self.ws_at(self.steps)

    def ws_at(self, steps: np.ndarray) -> Tensor:
        """Return the style vectors [N, L, W] after given numbers of steps [N]. 0 gives the initial ones."""
        # [N, T + 1, W] -> [N, W]: one step for each sample
        rows = torch.arange(len(self.path))
        offsets = self.path[rows, torch.from_numpy(np.asarray(steps)).long()]  # [N, W]
        # Adding an offset of 0 keeps style vectors bitwise.
        # The offset is added to all layers, which is a search in W and
        # not in W+. W+ reaches shapes that the generator rarely produces.
        return self.ws_before + offsets[:, None].to(self.ws_before)


def best_step(heldout_scores: np.ndarray, patience: int) -> tuple[int, bool]:
    """Apply the rule of `steps="auto"` to the held-out reward of one sample.

    Args:
        heldout_scores: held-out reward at the steps 0, 1, ... so far, [t + 1].
        patience: number of steps without a new highest value after which the sample stops.
    Returns: the step with the highest value, the first one if there are several; and True if the sample
        stops. Values after the end are not used, so a longer list gives the same step.

    >>> best_step(np.array([0.0, 1.0, 3.0, 2.0, 1.0, 9.0]), patience=2)
    (2, True)
    """
    highest_step = 0
    for step, score in enumerate(heldout_scores):
        if score > heldout_scores[highest_step]:
            highest_step = step
        # A strictly higher value is needed, so a plateau also uses up the patience.
        elif step - highest_step >= patience:
            return highest_step, True
    return highest_step, False


def ascend(
    generator: Generator,
    ws: Tensor,
    guidance: Guidance,
    heldout_reward: Reward | None,
    config: SearchConfig,
    on_step: Callable[[int, int], None] = lambda step, running_count: None,
) -> Ascent:
    """Run the search for a batch of samples. All samples share a synthesis, but no sample affects another.

    Args:
        generator: frozen generator.
        ws: style vectors [n, L, W].
        guidance: reward that is maximised.
        heldout_reward: reward that stops the samples; needed for steps="auto".
        config: settings of the search.
        on_step: function that is called before each step, with its number and the number of samples that
            still run.
    """
    start_time = time.monotonic()
    # A graph that produced ws would otherwise be kept alive by the result.
    ws = ws.detach()
    # Without the gate, no reward exceeds the threshold.
    threshold = guidance.quantile(config.gate_quantile) if config.gate else np.inf
    step_count = config.step_count
    # One parameter for each sample: Adam leaves a parameter without a gradient alone, so a sample can stop
    # while the others continue.
    offsets = [torch.zeros_like(ws[:1, 0], requires_grad=True) for _ in ws]  # n parameters [1, W]
    optimizer = torch.optim.Adam(offsets, lr=config.learning_rate)
    # On the CPU: the path is read only after the search. [n, T + 1, W]
    path = torch.zeros(len(ws), step_count + 1, ws.shape[2])
    # Row 0 of the steps is the score before the search, hence T + 1.
    rewards = np.full((len(ws), step_count + 1), np.nan)
    heldout = None if heldout_reward is None else rewards.copy()
    steps = np.zeros(len(ws), dtype=int)
    gated = np.zeros(len(ws), dtype=bool)
    running = list(range(len(ws)))  # indices of the samples that have not stopped
    # One more evaluation than steps, so that the last step has a score as well.
    for step in range(step_count + 1):
        on_step(step, len(running))
        present_offsets = torch.cat([offsets[index] for index in running])  # [n', W]
        path[running, step] = present_offsets.detach().float().cpu()
        # [n', L, W] + [n', 1, W]
        field = generator.field(ws[running] + present_offsets[:, None])
        observation = guidance.reward.observation.observe(field)
        scores = guidance.reward.score_observed(observation)  # [n']
        rewards[running, step] = scores.detach().double().cpu().numpy()
        if heldout is not None and heldout_reward is not None:
            with torch.no_grad():
                # Both bundled rewards have the same observation, which is then computed only once.
                heldout_scores = (
                    # Detached, so that no gradient of the held-out reward can reach the offsets.
                    heldout_reward.score_observed(observation.detach())
                    if heldout_reward.observation == guidance.reward.observation
                    else heldout_reward.score(field)
                )
            heldout[running, step] = heldout_scores.double().cpu().numpy()
        continues = []  # positions in `running`
        for position, index in enumerate(running):
            # The gate reads the score before the first step only.
            # A sample that crosses the threshold later continues.
            if step == 0 and rewards[index, 0] > threshold:
                gated[index] = True
                continue
            is_stopped = False
            if config.steps == "auto":
                assert heldout is not None  # `check_search` requires a held-out reward
                # The result may be an earlier step than the present one, so it can be below `step`.
                steps[index], is_stopped = best_step(heldout[index, : step + 1], config.patience)
            else:
                steps[index] = step
            if not is_stopped and step < step_count:
                continues.append(position)
        if not continues:
            break
        # None and not 0: Adam skips parameters without a gradient, and their momentum does not decay.
        optimizer.zero_grad(set_to_none=True)
        # The sum gives each sample the gradient that it would have alone.
        guidance.term(scores)[continues].sum().backward()
        next_running = [running[position] for position in continues]
        for index in set(running) - set(next_running):
            # Its gradient is 0 and not None, and Adam would move the sample by its momentum.
            offsets[index].grad = None
        optimizer.step()
        running = next_running
    return Ascent(
        ws_before=ws,
        path=path,
        rewards=rewards,
        heldout=heldout,
        steps=steps,
        gated=gated,
        seconds=time.monotonic() - start_time,
    )


def join(ascents: list[Ascent]) -> Ascent:
    """Join the results of several batches, in their order."""
    # Times add up, because batches run one after the other.
    joined: dict[str, Any] = {"seconds": sum(ascent.seconds for ascent in ascents)}
    for field_name in ("ws_before", "path"):
        joined[field_name] = torch.cat([getattr(ascent, field_name) for ascent in ascents])
    for field_name in ("rewards", "steps", "gated"):
        joined[field_name] = np.concatenate([getattr(ascent, field_name) for ascent in ascents])
    # Either all batches have held-out rewards or none has.
    heldout_parts = [ascent.heldout for ascent in ascents if ascent.heldout is not None]
    return Ascent(**joined, heldout=np.concatenate(heldout_parts) if heldout_parts else None)


def check_search(generator: Any, config: SearchConfig, reward: Reward, heldout_reward: Reward | None) -> None:
    """Check that a search is possible, before anything slow is computed.

    Raises: ValueError if the generator has no style vectors that can be optimised, if a reward has no
        gradient or does not fit the generator, or if steps="auto" has no independent held-out reward.
    """
    check_optimisable(generator)
    if not reward.observation.differentiable:
        raise ValueError(
            f"--reward: a reward of the kind {reward.observation.kind} has no gradient, so samples cannot be"
            " improved by it. Use it to choose the best of n samples (eg3d-rlhf reward best-of-n)."
        )
    check_reward(reward, generator, "--reward")
    if heldout_reward is None:
        if config.steps == "auto":
            raise ValueError(
                "--heldout-reward is missing: with --steps=auto, each sample stops where a held-out reward"
                " stops rising. Pass --heldout-reward=FILE, or a number of steps such as --steps=10."
            )
        return
    check_reward(heldout_reward, generator, "--heldout-reward")
    check_heldout(reward, heldout_reward)


def check_optimisable(generator: Any, source: str = "--network") -> None:
    """Raise ValueError if a generator has no style vectors that gradients could improve.

    Args:
        generator: a generator.
        source: start of the message, such as a flag.
    """
    # imported here, because only this check reads the registry of families
    from eg3d_rlhf.generators import FAMILIES

    # Generators of other packages may be missing from the registry. They are given the benefit of the doubt.
    family = FAMILIES[generator.architecture] if generator.architecture in FAMILIES else None
    if family is not None and "steer" not in family.released_tasks:
        raise ValueError(
            f"{source}: a file of the family {generator.architecture} holds finished shapes and no latents"
            " that could be optimised. Name the generator itself (stored latents are passed with --latents),"
            " or choose the best of n shapes by their scores (eg3d-rlhf score)."
        )


def improve(
    generator: Any,
    ws: Tensor,
    reward: Reward,
    heldout_reward: Reward | None = None,
    steps: int | Literal["auto"] = "auto",
    gate: bool = True,
    *,
    batch: int = 8,
    config: SearchConfig | None = None,
    on_batch: Callable[[Ascent], None] = lambda ascent: None,
) -> Ascent:
    """Improve samples by a reward, each by gradient ascent on its style vectors.

    Equal arguments give bitwise equal results. The generator and the rewards do not change.

    Args:
        generator: a generator or its network, frozen.
        ws: style vectors [N, L, W], for example of `ws_of_seeds`.
        reward: reward that is maximised.
        heldout_reward: independent reward that stops the samples; needed for steps="auto".
        steps: "auto", or the number of steps of every sample.
        gate: True leaves samples unchanged that already score above the quantile `config.gate_quantile` of
            the reward's scores on samples of the generator.
        batch: number of samples that are optimised together, which bounds the memory.
        config: further settings; `steps` and `gate` override them.
        on_batch: function that is called with the result of each batch.
    Returns: the style vectors before and after, and the scores by step.
    Raises: ValueError if the search is not possible, see `check_search`, or for ws of a wrong shape.

    >>> from eg3d_rlhf import load_generator, load_reward, ws_of_seeds
    >>> generator = load_generator().generator
    >>> improved = improve(generator, ws_of_seeds(generator, [200001]), load_reward(), steps=1)
    >>> bool(improved.rewards[0, 1] > improved.rewards[0, 0])
    True
    """
    generator = as_generator(generator)
    # The arguments win over the configuration, so that improve(..., steps=5) means what it says.
    config = dataclasses.replace(config or SearchConfig(), steps=steps, gate=gate)
    check_search(generator, config, reward, heldout_reward)
    check_shape("improve(ws)", ws, ("N", generator.num_ws, generator.w_dim), "Pass ws of `ws_of_seeds`.")
    guidance = Guidance(generator, reward)
    if heldout_reward is not None:
        heldout_reward = heldout_reward.eval().requires_grad_(False).channels_last()
    ascents = []
    with tqdm(total=len(ws), desc="samples", unit="sample") as progress:
        for ascent in ascend_in_batches(generator, ws, guidance, heldout_reward, config, batch):
            ascents.append(ascent)
            on_batch(ascent)
            progress.update(len(ascent.steps))
    return join(ascents)


def ascend_in_batches(
    generator: Generator,
    ws: Tensor,
    guidance: Guidance,
    heldout_reward: Reward | None,
    config: SearchConfig,
    batch: int,
    on_step: Callable[[int, int], None] = lambda step, running_count: None,
) -> Iterator[Ascent]:
    """Yield the results of `ascend` for consecutive batches of samples. See `ascend` for the arguments."""
    for ws_batch in ws.split(batch):
        yield ascend(generator, ws_batch, guidance, heldout_reward, config, on_step)
