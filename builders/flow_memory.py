"""Trace the memory of the published flow generators: python -m builders.flow_memory"""

import json
from dataclasses import asdict

import click

from eg3d_rlhf.core.cli import GroupedCommand
from eg3d_rlhf.tuning.flow.families import released_sizes
from eg3d_rlhf.tuning.flow.workspace.estimate import trace_costs
from eg3d_rlhf.tuning.flow.workspace.published_memory import DEVICE, FILE, PRECISION
from training.storage import write_atomic


def trace_generator(name: str) -> list[dict]:
    """Trace all stages of a published generator, and return the entries of the file.

    Args:
        name: name of the generator, a key of `released_sizes`.
    """
    costs = trace_costs(
        released_sizes()[name](), precision=PRECISION, updates=("lora", "full"), device=DEVICE, name=name
    )
    # The precision is the same for all entries, so the file does not repeat it.
    return [
        {key: value for key, value in asdict(cost).items() if key not in ("precision", "more_bytes")}
        for cost in costs
    ]


@click.command(cls=GroupedCommand)
def flow_memory() -> None:
    """Write the file of the published generators' memory, published_memory.json. It takes some minutes."""
    entries_by_generator = {name: trace_generator(name) for name in released_sizes()}
    lines = [
        f"{json.dumps(name)}: [\n" + ",\n".join(f" {json.dumps(entry)}" for entry in entries) + "\n]"
        for name, entries in entries_by_generator.items()
    ]
    write_atomic(FILE, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    click.echo(f"{FILE}: {len(entries_by_generator)} generators")


if __name__ == "__main__":
    flow_memory()
