"""Show what a network file holds: architecture, sizes, plane layout, truncation statistics, SHA-256, and every global it asks for.

FILE is a network file of ours, a pickle of EG3D (.pkl; nothing in it is run), a run folder, or nothing for the bundled generator.

\b
Example:
    python tools/inspect_network.py assets/generator.safetensors
"""

import json
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eg3d_rlhf.cli import GroupedCommand, option  # noqa: E402
from eg3d_rlhf.pickles import describe  # noqa: E402


@click.command(cls=GroupedCommand, help=__doc__)
@click.argument("file", type=click.Path(path_type=Path), required=False)
@option("--seeds", metavar="INT", type=click.IntRange(2, 100_000), default=256, help="Latents for the statistics of w.")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@option("--globals-only", is_flag=True, help="Print the file's facts and the names it asks for; build no network.")
def main(file: Path | None, seeds: int, as_json: bool, globals_only: bool) -> None:
    found = describe.describe_file(file)
    if not as_json:
        click.echo("\n".join(describe.lines(found)))
    if not globals_only:
        networks = describe.describe_networks(file, seeds)
        found.update(networks)
        if not as_json:
            click.echo("\n".join(describe.lines(networks)))
    if as_json:
        click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
