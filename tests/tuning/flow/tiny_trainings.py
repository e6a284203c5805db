"""Trainings of the tiny generator, as tests and the processes that they start run them."""

import os
import signal
from pathlib import Path

from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.tuning.flow.base.sampling import HeldOut, crossed
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.training.conditioned_stage import ConditionedStage
from eg3d_rlhf.tuning.flow.training.pair_training import train_stage
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from tests.tuning.flow.tiny_flow import NAMES, TinyPipeline, likes_target, tiny_config, voxel_pairs
from training.distributed import SINGLE

FINISHED = (
    "stats.jsonl",
    "warnings.json",
    "result.json",
    "policy/policy.json",
    "policy/adapter_model.safetensors",
)
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.3, targets=("to_out",))
EVERYTHING = {  # that a resumed run must get right
    "dpo": DpoConfig(beta=20.0, condition_dropout=0.2),
    "lora": LORA,
    "batch_gpu": 4,
    "held_out_every": 15,
    "log_every": 4,
    "checkpoint_every": 10,
    "patience": 50,
    "max_drop": 1.0,
}
CASES = {  # for several ranks
    "dpo": {"dpo": DpoConfig(beta=20.0, condition_dropout=0.2), "lora": LORA},
    "sft": {"dpo": DpoConfig(kind="sft"), "lora": None},
    "full": {"dpo": DpoConfig(beta=20.0), "lora": None},
}
SHORT = {
    "steps": 12,
    "held_out_every": 4,
    "log_every": 2,
    "checkpoint_every": 5,
    "patience": 50,
    "max_drop": 1.0,
}


def silent(line):
    del line


def run(out, pairs=None, config=None, pipeline=None, stage="voxels", **options):
    """One training; prints nothing."""
    pairs = voxel_pairs(24) if pairs is None else pairs
    config = config or tiny_config()
    conditioned = ConditionedStage.from_pipeline(pipeline or TinyPipeline(), stage)
    return train_stage(conditioned, pairs, config, out, **{"say": silent, **options})


def judge(pipeline, per_condition=8, **options) -> HeldOut:
    """Win rate of networks of the second stage."""
    prompts, seeds = crossed(NAMES, per_condition, 0)
    return HeldOut(
        pipeline=pipeline,
        stage="voxels",
        reward=likes_target,
        prompts=prompts,
        seeds=seeds,
        batch=64,
        **options,
    )


def with_everything(out, **options):
    """A training with all that has a state."""
    pipeline = TinyPipeline()
    return run(out, config=tiny_config(**EVERYTHING), pipeline=pipeline, held_out=judge(pipeline), **options)


def case_of(out: Path, name: str, batch_gpu: int | None = None, stop: bool = False, **options):
    """A short training of CASES; stop: a SIGTERM comes to the process that prints,
    after the second update.
    """
    pipeline = TinyPipeline()

    def say(line):
        if stop and line.startswith("step      2/"):
            os.kill(os.getpid(), signal.SIGTERM)

    config = tiny_config(**SHORT, **CASES[name], batch_gpu=batch_gpu)
    held_out = judge(pipeline, ranks=options.get("ranks", SINGLE))
    return run(out, voxel_pairs(20, w2=True), config, pipeline, held_out=held_out, say=say, **options)


def contents(out) -> dict[str, bytes]:
    """All that equal trainings write alike."""
    return {name: (out / name).read_bytes() for name in FINISHED if (out / name).exists()}


def at(line: str, act):
    """What `say` does at a line."""
    return lambda text: act() if text.startswith(line) else None


def interrupt():
    raise KeyboardInterrupt


def toy_case(out: Path, stage: str, **options):
    """Ten updates of every parameter of a bundled network; of 30 pairs, so that a batch runs over the end of
    a pass.
    """
    problem = toy_problem(0)
    config = tiny_config(lora=None, steps=10, batch=8, batch_gpu=4, lr=1e-4, warmup=0, log_every=1)
    return train_stage(
        ConditionedStage.from_pipeline(problem.pipeline, stage),
        problem.train_pairs[stage][:30],
        config,
        out,
        say=silent,
        **options,
    )
