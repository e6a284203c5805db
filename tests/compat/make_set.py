"""Write a second set of reference values with this project's own code: python -m tests.compat.make_set FOLDER
[--seed=1] [FAMILY ...].

Recipes differ from those of tests/references: seeds, salts, sizes, options, names of cases, and what is left
out. Then EG3D_RLHF_FIXTURES=FOLDER pytest tests/compat shows that no recipe is fixed in a test. It proves
nothing about the originals. Each family has a module make_<family>.py beside this one, whose
make(root, seed) writes below root.
"""

import importlib
from pathlib import Path

import click
import numpy as np
import torch

FAMILIES = sorted(
    path.stem.removeprefix("make_")
    for path in Path(__file__).parent.glob("make_*.py")
    if path.stem != Path(__file__).stem
)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("families", nargs=-1, type=click.Choice(FAMILIES))
@click.option("--seed", default=1, show_default=True)
def main(folder: Path, families: tuple[str, ...], seed: int) -> None:
    """Write the set into FOLDER, all families or those named."""
    for family in families or FAMILIES:
        torch.manual_seed(seed)  # a family's values do not depend on which others are written
        np.random.seed(seed)
        importlib.import_module(f"tests.compat.make_{family}").make(folder, seed)
        click.echo(f"{family}: written below {folder}")


if __name__ == "__main__":
    main()
