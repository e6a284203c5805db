"""Train every reward on the bundled labels, tune the bundled generator by each, and put them side by side: `make zoo`.

A short table by default: smaller depth maps, fewer epochs, half the length of tuning. --full takes every default. Finished parts are not
repeated, an interrupted training goes on. Writes zoo.json and a page with one table, one plot and the same latents tuned by every reward.

\b
Example:
    python tools/zoo.py --only=points --dry-run
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import _repository  # noqa: F401
import click
from seeds import known_run
from tqdm import tqdm

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.cli import GroupedCommand, file_hash, option
from eg3d_rlhf.evaluation import zoo
from eg3d_rlhf.evaluation.comparison import Sources, load_comparison
from eg3d_rlhf.experiments import jobs as running
from eg3d_rlhf.experiments.media.rendering import parse_seeds
from eg3d_rlhf.experiments.page import write_page
from eg3d_rlhf.generators import LoadedGenerator
from eg3d_rlhf.rewards.reward import load_reward
from eg3d_rlhf.rewards.run import BUNDLED_LABELS
from eg3d_rlhf.tuning.gan.settings import PRESETS, REWARDED
from training import checkpoint
from training.storage import write_atomic

REPO = Path(__file__).resolve().parents[1]
LENGTH = PRESETS["heads64", REWARDED]["kimg"]  # of the demo
TUNED = "tuned.json"  # what tuning did, beside the networks
DONE = "done.json"  # written when a part is finished: its command, what it read, its cost


def inputs(command: list[str]) -> dict[str, str]:
    """Hashes of what a part reads: what is bundled, and what the parts before it made."""
    files = {path.name: path for path in (bundled.GENERATOR, bundled.REWARD, bundled.WATCH, BUNDLED_LABELS)}
    files |= {name: Path(value) for name, _, value in (flag.partition("=") for flag in command) if name in ("--reward-ckpt", "--unpaired")}
    return {name: file_hash(path) for name, path in files.items() if path.is_file()}


def finished(folder: Path, command: list[str]) -> dict | None:
    """What a part cost, where it is finished with this command and these inputs."""
    path = folder / DONE
    known = json.loads(path.read_text()) if path.is_file() else {}
    return known if known.get("command") == command and known.get("inputs") == inputs(command) else None


def call(folder: Path, command: list[str], threads: int) -> dict:
    """Run one of our scripts with its output in log.txt; returns its cost, which is kept. Raises: ValueError where it failed.

    The peak memory is never below that of this program (0.4 GB), from which the script is forked.
    """
    if (folder / DONE).is_file():  # finished, but with another command or other inputs
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    script, *flags = continued(folder, command)
    started = time.time()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen([sys.executable, str(REPO / script), *flags], stdout=log, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{shlex.join(command)}: expected status 0, got {process.returncode}. See {folder / 'log.txt'}; the same command "
                         "goes on.")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # of ru_maxrss
    cost = {"command": command, "inputs": inputs(command), "seconds": time.time() - started, "megabytes": usage.ru_maxrss * unit / 1e6}
    write_atomic(folder / DONE, json.dumps(cost, indent=1).encode())
    return cost


def reward_of(out: Path, name: str) -> Path:
    """The file of a reward."""
    return bundled.REWARD if zoo.ENTRIES[name].train is None else out / name / "reward" / "reward.safetensors"


def commands(out: Path, name: str, seeds: list[int], full: bool, kimg: float) -> dict[str, list[str]]:
    """What makes a reward and tunes by it with each training seed: a command for each part, in order."""
    entry, parts, folder = zoo.ENTRIES[name], {}, out / name
    if entry.label:
        parts["label"] = ["tools/label_synthetic.py", *entry.label, f"--out={folder / 'label' / 'labels.jsonl'}"]
    if entry.train is not None:
        taught = [f"--labels={BUNDLED_LABELS}", f"--unpaired={folder / 'label' / 'labels.jsonl'}"] if entry.label else []
        parts["reward"] = ["tools/train_reward.py", *entry.train, *taught, *(() if full else entry.short), f"--out={folder / 'reward'}"]
    flags = [*entry.tune, f"--reward-ckpt={reward_of(out, name)}", f"--reward-watch={bundled.WATCH}", f"--kimg={kimg:g}"]
    tune = {f"seed{seed}": ["train.py", *flags, f"--seed={seed}", f"--outdir={folder / f'seed{seed}'}", "--no-summary"] for seed in seeds}
    return parts | tune


def continued(folder: Path, command: list[str]) -> list[str]:
    """The command that goes on with what an interrupted one left; the same where there is nothing to go on with."""
    if command[0] == "tools/train_reward.py":
        return [*command, "--resume"] if (folder / "state.pt").is_file() else command
    if command[0] == "train.py":
        run = known_run(folder, [flag for flag in command[1:] if not flag.startswith("--outdir")])
        return ["train.py", f"--resume={run}"] if run is not None and checkpoint.available(run) else command
    return command


def make(folder: Path, command: list[str], threads: int) -> dict:
    """The cost of a part; it is run where it is not finished."""
    return finished(folder, command) or call(folder, command, threads)


@click.command(cls=GroupedCommand, help=__doc__)
@option("--out", metavar="FOLDER", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/zoo"), help="Folder to write.")
@option("--only", metavar="LIST", default=",".join(zoo.ENTRIES), help="Rewards.")
@option("--seeds", metavar="LIST", default="0", help="Training seeds of tuning.")
@option("--full", is_flag=True, help="Train rewards and tune at default size and length.")
@option("--jobs", metavar="INT", type=click.IntRange(min=1), default=min(2, os.cpu_count() or 1), show_default="2, or the cores",
        help="Rewards worked on side by side.")
@option("-n", "--dry-run", is_flag=True, help="Print the commands as JSON and stop.")
def main(out: Path, only: str, seeds: str, full: bool, jobs: int, dry_run: bool) -> None:
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names or set(names) - set(zoo.ENTRIES):
        raise ValueError(f"--only: expected some of {', '.join(zoo.ENTRIES)}, got {only!r}. Correct the list.")
    names = [name for name in zoo.ENTRIES if name in names]
    length = LENGTH if full else LENGTH / 2
    plans = {name: commands(out, name, list(dict.fromkeys(parse_seeds(seeds))), full, length) for name in names}
    if dry_run:
        click.echo(json.dumps(plans, indent=1))
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    made = work(out, plans, jobs, threads)
    found, networks = measured(out, {name: made[name] for name in names}, jobs)  # in the table's order
    write_atomic(out / "zoo.json", json.dumps({"rewards": found, "full": full, "kimg": length}, indent=1).encode())
    note = (f"{'Full' if full else 'Short'} table: {round(1000 * length)} images of tuning, {len(seeds.split(','))} training seed(s), "
            f"{jobs} side by side with {threads} thread(s) each.")
    part = zoo.job(found, networks, psi=0.7, note=note)
    findings = running.run([part], out, fresh=True, quiet=True)
    page = write_page(out / "index.html", "Every reward on the bundled heads", "Each learnt from the same labels, and tuned the same "
                      "generator.", [part], findings, findings[part.key].says)
    lines = zoo.rows(found)
    table = [list(lines[0]), *([str(cell) for cell in line.values()] for line in lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    click.echo("\n" + "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in table))
    click.echo(f"\nWritten to {out}: zoo.json, {page.name} (open it in a browser)")


def work(out: Path, plans: dict, jobs: int, threads: int) -> dict[str, dict]:
    """All parts of all rewards, `jobs` side by side; the longest reward begins, and a reward's parts come in order. Returns their costs."""
    order = sorted(plans, key=lambda name: -zoo.ENTRIES[name].minutes)
    rest, made = {name: list(plans[name].items()) for name in order}, {name: dict[str, dict]() for name in order}
    under_way: dict[Future, tuple[str, str]] = {}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=sum(map(len, rest.values())), desc="rewards trained and tuned", unit="part") as bar:

        def begin(name: str) -> None:
            if rest[name]:
                part, command = rest[name].pop(0)
                under_way[pool.submit(make, out / name / part, command, threads)] = name, part

        try:
            for name in order:
                begin(name)
            while under_way:
                for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                    name, part = under_way.pop(done)
                    made[name][part] = done.result()
                    bar.set_postfix_str(f"last: {name}, {part}; logs in {out}/*/*/log.txt")
                    bar.update()
                    begin(name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made


def measured(out: Path, made: dict[str, dict], jobs: int) -> tuple[dict, dict]:
    """zoo.json's lines, and the networks of the page's picture: before, and after by each reward with its first seed."""
    networks: dict[str, LoadedGenerator] = {}

    def line(name: str) -> dict:
        figures, costs = [], made[name]
        for part in (part for part in costs if part.startswith("seed")):
            run = sorted((out / name / part).glob("[0-9]*-*"))[-1]
            c = load_comparison(Sources(run=run, after=run))
            figures.append(_known(run, c.after.hash) or _keep(run, c.after.hash, zoo.tuned(c)))
            networks.setdefault("before", c.before)
            networks.setdefault(name, c.after)
        seconds = {part: cost["seconds"] for part, cost in costs.items()}
        reward = load_reward(reward_of(out, name), "cpu")
        return zoo.record(reward, figures, seconds, max(cost["megabytes"] for cost in costs.values()))

    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(made, tqdm(pool.map(line, made), total=len(made), desc="what tuning did", unit="reward"), strict=True))
    return found, {name: networks[name] for name in ("before", *made)}


def _known(run: Path, after: str) -> dict | None:
    path = run / TUNED
    known = json.loads(path.read_text()) if path.is_file() else {}
    return known if known.get("after") == after else None


def _keep(run: Path, after: str, figures: dict) -> dict:
    write_atomic(run / TUNED, json.dumps({**figures, "after": after}).encode())
    return figures


if __name__ == "__main__":
    main()
