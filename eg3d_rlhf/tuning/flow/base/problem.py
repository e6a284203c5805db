"""What a flow is tuned on: a pipeline, people's pairs and three judges. A folder of a generator's networks
becomes one with

    PAIRS/<stage>                     pairs of a stage; some stages may be missing
    PAIRS/conditions.safetensors      embeddings of their conditions
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from eg3d_rlhf.core.cli import file_hash
from eg3d_rlhf.models.sparse import Latent, SparseSample, feats_of
from eg3d_rlhf.tuning.flow.base.conditioning import CONDITIONS
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair, read_pairs
from eg3d_rlhf.tuning.flow.base.sampling import HeldOut, Models, crossed, generate
from eg3d_rlhf.tuning.flow.base.stage import CONVENTION, AssetReward, Pipeline, Voxels, stage_of
from training.config import check_knobs, knob
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm

if TYPE_CHECKING:
    from eg3d_rlhf.tuning.flow.base.singles import Labelled

MOST_TO_CHOOSE = 128  # pairs that are looked at in every evaluation while training


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A pipeline, the people's pairs, and the three judges: one labels or learns, one chooses, one is kept
    for the final table.
    """

    pipeline: Pipeline
    human_pairs: Callable[[str], list[PreferencePair]]  # by stage name; the same assets at every stage
    # by kind of label: assets that its own people judged one by one
    human_singles: Callable[[str], "Labelled"] | None = None
    # scores the loop's assets for w1 and w2; None: no loop, only stages by themselves
    reward: AssetReward | None
    chooser: AssetReward | None  # held-out win rate and early stop; None: neither
    final: AssetReward | None  # the table alone
    train_conditions: Sequence[str]
    held_out_conditions: Sequence[str]  # never trained on; the table's
    # never trained on either: checkpoints are chosen on these; none: on the table's own
    choosing_conditions: Sequence[str] = ()
    # JSON: hashes of all files that it came from, for the names of artefacts
    identity: Mapping = field(default_factory=dict)
    # sub-scores [N] of (assets, conditions), likewise
    parts: Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]] | None = None
    # (stage, conditions): people's pairs of conditions
    unseen_pairs: Callable[[str, Sequence[str]], list[PreferencePair]] | None = None
    # that are not trained on
    # (pairs of the last stage, training seed): a reward of
    teach: Callable[[Sequence[PreferencePair], int], AssetReward] | None = None
    # finished assets
    # by name of a judge, conditions whose pairs it learnt from
    fitted_to: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # finer ones, of the table of online tuning
    measures: Callable[[Sequence, Sequence[str]], Mapping[str, torch.Tensor]] | None = None

    def __post_init__(self):
        names = [stage.name for stage in self.pipeline.stages]
        parts = [set(self.train_conditions), set(self.held_out_conditions), set(self.choosing_conditions)]
        if not names or len(set(names)) < len(names):  # a plugin's family or reward may err here
            raise ValueError(
                f"Problem.pipeline: expected stages of different names, got {names}. Give all stages, in"
                " order."
            )
        if both := sorted(name for a, b in combinations(parts, 2) for name in a & b):
            raise ValueError(
                f"Problem: expected held-out conditions apart from the trained, got {both[:5]} in both."
                " Divide them."
            )
        if not self.train_conditions:
            raise ValueError("Problem.train_conditions: expected one condition or more, got none. Name them.")
        if self.final is not None and any(self.final is judge for judge in (self.reward, self.chooser)):
            raise ValueError(
                "Problem.final: expected a judge of its own, got one that also weighs or chooses. The table"
                " would flatter."
            )

    @property
    def choosing(self) -> Sequence[str]:
        return self.choosing_conditions or self.held_out_conditions

    def pairs_to_choose(self, stage: str) -> list[PreferencePair]:
        """People's pairs on which a network is chosen while it trains, MOST_TO_CHOOSE at most, drawn by their
        names.
        """
        pairs = [] if self.unseen_pairs is None else self.unseen_pairs(stage, self.choosing)
        return sorted(pairs, key=lambda pair: derive_seed("to choose", pair.id))[:MOST_TO_CHOOSE]

    def pairs_to_tell(self, stage: str) -> list[PreferencePair]:
        """People's pairs that neither train nor choose: what tells whether the labels were learnt."""
        return [] if self.unseen_pairs is None else self.unseen_pairs(stage, self.held_out_conditions)


_what = functools.partial(knob, group="What is trained")
PRECISIONS = ("auto", "bfloat16", "float32")


def chosen_precision(precision: str, device: str | torch.device) -> str:
    """bfloat16 or float32. Where float32 is not asked for, CUDA multiplies what is left of it in TF32, from
    now on in this process.
    """
    cuda = torch.device(device).type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cuda and precision != "float32"
    return ("bfloat16" if cuda else "float32") if precision == "auto" else precision


@dataclass(frozen=True, kw_only=True)
class EncodingSource:
    """How TRELLIS's assets become latents again."""

    voxel_share: float = _what(
        0.25,
        "TRELLIS: a decoded asset's voxel is filled above this share of the mean opacity.",
        above=0,
        rare=True,
    )
    views: int = _what(150, "TRELLIS: pictures behind the features of a decoded asset.", low=1, rare=True)


@dataclass(frozen=True, kw_only=True)
class ProblemSource(EncodingSource):
    """What a problem is read from."""

    pipeline: str = _what(
        "toy",
        "The bundled toy, or a folder of a generator's networks (docs/reference/families.md).",
        metavar="toy|DIR",
    )
    pairs: str | None = _what(
        None,
        "People's pairs: a folder with one for each stage in it, as eg3d-rlhf flow tune --pairs-only makes.",
        metavar="DIR",
        shown="the toy's own",
    )
    labelled: str = _what(
        "others",
        "Toy: who made the assets that people judged: the generator's own, or others', with twice the"
        " defects.",
        choices=("own", "others"),
        rare=True,
    )
    seed: int = 0  # of the toy's people, or of the division into trained and held-out conditions
    conditions: str | None = _what(
        None, "Embeddings of the conditions.", metavar="FILE|DIR", shown="beside the pairs"
    )
    dtype: str = _what(
        "float32", "In which the flows are held.", choices=("float32", "float16", "bfloat16"), rare=True
    )
    precision: str = _what(
        "auto",
        "Of the flows' passes, in training, win rates and samples alike; adapters, sums and the optimiser"
        " stay float32. auto: bfloat16 on CUDA, float32 on a CPU.",
        choices=PRECISIONS,
        rare=True,
    )
    held_out: float = _what(
        0.2, "Share of the conditions that is never trained on.", above=0, below=1, rare=True
    )
    # conditions to train on, to choose on, to tell by; None: divided by a hash
    splits: tuple[tuple[str, ...], ...] | None = None
    parts: str = _what(
        "all",
        "SAM 3D: what is learnt of its first stage: shape and pose alike, the shape alone, or both by its"
        " weights.",
        choices=("all", "shape", "file"),
        rare=True,
    )
    needs_pairs: ClassVar[bool] = True

    def __post_init__(self):
        check_knobs(self)


def read_stages(
    folders: Mapping[str, Path], pipeline: Pipeline, check: Callable[[Path, str, Mapping], None]
) -> Callable[[str], list[PreferencePair]]:
    """People's pairs from a folder for each stage; the result gives those of a stage by its name.

    Args: check: refuses what is of another pipeline, from the folder, the stage and what the writer had to
        say.
    Raises: ValueError where the pairs are not of the same assets: the loop samples on what a stage's
        preferred one leaves to the next.
    """
    read: dict[str, list[PreferencePair]] = {}
    for stage, folder in folders.items():
        read[stage], meta = read_pairs(folder, stage_of(pipeline, stage))
        if (got := meta.get("convention")) != CONVENTION:
            raise ValueError(
                f"{folder}: expected the convention {CONVENTION!r}, got {got!r}. Make the pairs again with"
                " this program."
            )
        check(folder, stage, meta)
    (first, pairs), *others = read.items()
    expected = {(pair.id, pair.condition) for pair in pairs}
    for stage, pairs_there in others:
        odd = sorted({(pair.id, pair.condition) for pair in pairs_there} ^ expected)
        if odd:
            got = f"{len(odd)} that one of them lacks, {odd[0][0]!r} first. Make both from the same assets"
            raise ValueError(f"pairs: expected the same pairs at stages {first!r} and {stage!r}, got {got}.")

    def of_stage(stage: str) -> list[PreferencePair]:
        stage_of(pipeline, stage)
        if stage not in read:
            raise ValueError(
                f"pairs: expected pairs of stage {stage!r}, got those of {', '.join(read)} alone. Add them."
            )
        return read[stage]

    return of_stage


def divided(names: Sequence[str], seed: int, held_out: float) -> tuple[list[str], list[str], list[str]]:
    """Conditions to train on, one at least; and of a share that is held out, those to choose on and the
    table's, by a hash of names.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    count = min(max(1, round(held_out * len(order))), len(order) - 1)
    return order[count:], order[: count // 2], order[count // 2 : count]  # one alone is the table's


def pair_folders(path: Path, stages: Sequence[str]) -> dict[str, Path]:
    """Pair folders by stage, in a folder that holds one for each, or of one such.

    Raises: FileNotFoundError, ValueError.
    """
    if (path / "meta.json").is_file():
        folders = {_stage_in(path / "meta.json"): path}
    else:
        folders = {stage: path / stage for stage in stages if (path / stage).is_dir()}
    if not folders:
        what = f"a folder of pairs, or {' or '.join(stages)} in it"
        raise FileNotFoundError(
            f"pairs: expected {what}, got none at {path}. Make some: eg3d-rlhf flow tune WORK --pairs-only."
        )
    unknown = sorted(set(folders) - set(stages))
    if unknown:
        raise ValueError(
            f"pairs: expected stages {' and '.join(stages)}, got {', '.join(unknown)}. They are of another"
            " pipeline."
        )
    return folders


def _stage_in(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with a stage, got {error}. Restore the file.") from None


def conditions_beside(folders: Mapping[str, Path], given: Path | None = None) -> Path:
    """The file of embeddings: the one that is given, else that beside the pairs.

    Raises: FileNotFoundError.
    """
    # or WORK's
    places = [place / CONDITIONS for folder in folders.values() for place in folder.absolute().parents[:2]]
    path = Path(given or next((path for path in places if path.is_file()), places[0]))
    if given is None and not path.is_file():
        raise FileNotFoundError(
            f"conditions: expected embeddings of the pairs' conditions at {places[0]}, got none. Name"
            " --conditions."
        )
    return path


def hash_of(path: Path) -> str:
    """Of a file, or of a folder's names and bytes."""
    if path.is_file():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    return digest.hexdigest()


# Judging: on what checkpoints are chosen, and the scores behind a table.

TABLE = "Judging and ablation"  # title of its flags
JUDGES = ("final", "chooser", "reward")


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """On what the win rate is measured that chooses checkpoints and stops training early."""

    per_condition: int = knob(4, "Noises for each held-out condition.", TABLE, name="choose_noises", low=1)
    batch: int = knob(64, "Assets at once; bounds memory.", TABLE, name="judge_batch", low=1, rare=True)
    seed: int = 0  # of the noises, which are not those of the table

    def __post_init__(self):
        check_knobs(self)

    def held_out(
        self, problem: Problem, stage: str, others: Models, against: Models, ranks: Ranks = SINGLE
    ) -> HeldOut | None:
        """The judge of a stage's training; None for a problem that has none to choose by.

        Args: others, against, ranks: see HeldOut.
        """
        if problem.chooser is None:
            return None
        conditions, seeds = crossed(problem.choosing, self.per_condition, self.seed)
        return HeldOut(
            pipeline=problem.pipeline,
            stage=stage,
            reward=problem.chooser,
            conditions=conditions,
            seeds=seeds,
            others=others,
            against=against,
            batch=self.batch,
            ranks=ranks,
        )


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What is generated for the table: the same noises whatever is judged, so that generators are compared
    pair by pair.
    """

    per_condition: int = knob(
        8, "Assets per held-out condition and training behind the table.", TABLE, name="table_noises", low=2
    )
    batch: int = knob(
        64,
        "Assets at once; bounds memory.",
        TABLE,
        name="judge_batch",
        low=1,
        shown="the problem's own",
        rare=True,
    )
    seed: int = 0  # of the noises, apart from those that are trained or chosen on

    def __post_init__(self):
        check_knobs(self)

    def crossed(self, problem: Problem) -> tuple[list[str], list[int]]:
        """Every held-out condition per noise, and the noises' seeds, [C S] each."""
        pairs = [(name, k) for name in problem.held_out_conditions for k in range(self.per_condition)]
        return [name for name, _ in pairs], [
            derive_seed("table", self.seed, name, k) % 2**31 for name, k in pairs
        ]


def judged(
    problem: Problem,
    models: Models,
    judging: Judging,
    on_asset: Callable[[int], None] | None = None,
    spreads: bool = False,
    given: Mapping[str, Sequence[Voxels]] | None = None,
) -> dict:
    """Scores of the held-out conditions' assets, as JSON: {"conditions": [C], "scores":
    {judge or part: [C][S]}}.

    Judges: those of JUDGES that the problem has, and the parts of its table. The noises are the same whatever
    is judged, so that generators are compared asset by asset.
    Args: spreads: with "spread": {stage: [C]} of the stages before the last, see `spread`; and of the final
        score, its standard deviation over a condition's assets. given: by the name of a stage, what the
        stages before leave to it, [C S] in the order of Judging.crossed; they are not run.
    Raises: ValueError for a score that is not finite.
    """
    judges = {name: judge for name in JUDGES if (judge := getattr(problem, name)) is not None}
    scores: dict[str, list] = {}
    spread_of: dict[str, list[float]] = (
        {stage.name: [] for stage in problem.pipeline.stages[:-1]} if spreads else {}
    )
    names = list(problem.held_out_conditions)
    S = judging.per_condition
    block = max(1, judging.batch // S)
    all_conditions, all_seeds = judging.crossed(problem)
    for i in tqdm(
        range(0, len(names), block),
        desc="judging",
        unit="batch",
        leave=False,
        disable=True if on_asset else None,
    ):
        part = names[i : i + block]
        rows = slice(i * S, (i + block) * S)
        conditions = all_conditions[rows]
        seeds = all_seeds[rows]
        left = {stage: places[rows] for stage, places in (given or {}).items()}
        assets = generate(problem.pipeline, conditions, seeds, models, judging.batch, left)
        values = {name: judge(assets, conditions) for name, judge in judges.items()}
        if problem.parts is not None:
            values |= problem.parts(assets, conditions)
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name}: expected finite scores, got {value.tolist()}. Correct that judge.")
            scores.setdefault(name, []).extend(value.detach().double().cpu().view(-1, S).tolist())
        encoded = problem.pipeline.encode(assets) if spread_of else []
        # encoded latents of the last stage may be dear, and are not needed
        for stage, of_stage in spread_of.items():
            of_stage += [
                spread([latents[stage] for latents in encoded[k * S : (k + 1) * S]]) for k in range(len(part))
            ]
        if on_asset:
            on_asset(len(assets))
    if not spreads:
        return {"conditions": names, "scores": scores}
    spread_of["score"] = torch.tensor(scores["final"], dtype=torch.float64).std(1).tolist()
    return {"conditions": names, "scores": scores, "spread": spread_of}


def spread(latents: Sequence[Latent]) -> float:
    """How far assets of one condition differ: standard deviation over them, of every number, in the mean; 0
    where all are alike.

    On voxels, of the mean features, since they lie in different places.
    """
    rows = [x.feats.mean(0) if isinstance(x, SparseSample) else feats_of(x).flatten() for x in latents]
    return float(torch.stack(rows).double().std(0).mean())
