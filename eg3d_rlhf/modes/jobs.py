"""The command eg3d-rlhf: every job of the project by noun and verb, each imported when it is asked for.

    eg3d-rlhf                        all jobs on one screen
    eg3d-rlhf samples mesh --help    one of them

A job is a line of JOBS. The scripts of tools/ are the same commands under names that EG3D's users and the
papers' readers know.
"""

import difflib
import importlib
import sys

import click
from click.shell_completion import CompletionItem

from eg3d_rlhf.core import renamed
from eg3d_rlhf.core.cli import user_errors, version_flag
from eg3d_rlhf.modes import ModeCommand

PROGRAM = "eg3d-rlhf"

# Words after eg3d-rlhf: module and click command, and what the job does.
JOBS: dict[str, tuple[str, str]] = {
    "train": ("eg3d_rlhf.modes.jobs:train", "a generator, by its data or a reward; see --mode"),
    "label": ("eg3d_rlhf.modes.label:main", "shapes or any 3D assets in the browser; export, ..."),
    "label synthetic": (
        "eg3d_rlhf.modes.label_files:synthetic",
        "a generator's seeds, by the programmatic annotator",
    ),
    "label elo": ("eg3d_rlhf.modes.label_files:elo", "rate methods from pairwise judgements"),
    "study": ("eg3d_rlhf.modes.study:main", "compare two generators blind, with several people"),
    "reward train": (
        "eg3d_rlhf.modes.reward_training:train",
        "a reward on labels of pairs or of single shapes",
    ),
    "reward mesh": (
        "eg3d_rlhf.modes.mesh_reward:main",
        "a reward of meshes on unpaired labels (RewardCS)",
    ),
    "reward latent": (
        "eg3d_rlhf.modes.latent_reward:latent",
        "a reward that reads the latents of a flow stage",
    ),
    "reward join": ("eg3d_rlhf.modes.reward_files:join", "several into one file"),
    "reward import": ("eg3d_rlhf.modes.reward_files:release", "the paper's released reward"),
    "reward best-of-n": (
        "eg3d_rlhf.modes.best_of_n:main",
        "how far it can be trusted, before any tuning",
    ),
    "check-assets": ("eg3d_rlhf.modes.check_assets:main", "how many meshes of a folder are solids"),
    "score": ("eg3d_rlhf.modes.score:main", "generators of any family by one reward"),
    "flow new": ("eg3d_rlhf.modes.flow_new:new", "make the folder WORK for a generator and its inputs"),
    "flow sample": ("eg3d_rlhf.modes.flow_sample:sample", "assets to compare, with their latents"),
    "flow label": ("eg3d_rlhf.modes.flow_label:label", "compare them in the browser"),
    "flow tune": ("eg3d_rlhf.modes.flow_tune:tune_command", "stages learn from the answers, if these teach"),
    "flow export": (
        "eg3d_rlhf.modes.flow_export:export_command",
        "the tuned generator in its released layout",
    ),
    "flow study": ("eg3d_rlhf.modes.flow_study:study", "tuned against what it was and its control, blind"),
    "flow check": ("eg3d_rlhf.modes.flow_check:check", "whether a folder fits, and what it is good for"),
    "report evaluate": ("eg3d_rlhf.modes.reports:evaluate", "what tuning changed, and whether it got better"),
    "report attribute": ("eg3d_rlhf.modes.reports:attribute", "which regions the reward's change came from"),
    "report embed": ("eg3d_rlhf.modes.reports:embed", "where the reward sees tuned samples"),
    "report sweep": (
        "eg3d_rlhf.modes.report_studies:sweep",
        "reward against distance and geometry, over weights",
    ),
    "report all": ("eg3d_rlhf.modes.report_all:report_all", "these four, of a run and its control"),
    "report images": ("eg3d_rlhf.modes.reports:images", "render the images that end a reward run again"),
    "report method": ("eg3d_rlhf.modes.reports:method", "the method as one figure"),
    "report seeds": ("eg3d_rlhf.modes.report_studies:seeds", "the demo with several training seeds"),
    "report heads": (
        "eg3d_rlhf.modes.report_shapes:heads",
        "networks beside the whole heads that latents name",
    ),
    "report solid": ("eg3d_rlhf.modes.report_shapes:solid", "whether shapes are sound bodies"),
    "report controlled-study": (
        "eg3d_rlhf.modes.report_studies:controlled_study",
        "labels against controls and baselines",
    ),
    "report rewards": (
        "eg3d_rlhf.modes.report_studies:rewards",
        "every kind of reward, trained and tuned by",
    ),
    "generator inspect": (
        "eg3d_rlhf.modes.network_files:inspect_network",
        "what a network file holds; pickles are never run",
    ),
    "generator convert": (
        "eg3d_rlhf.modes.network_files:convert",
        "to .safetensors, a state dict or a tri-grid",
    ),
    "generator invert": (
        "eg3d_rlhf.modes.inversion:main",
        "from an image to a shape, with a reward",
    ),
    "samples images": ("eg3d_rlhf.modes.samples:images", "three views of every seed (gen_samples)"),
    "samples videos": ("eg3d_rlhf.modes.samples:videos", "orbits through seeds (gen_videos)"),
    "samples mesh": ("eg3d_rlhf.modes.samples:mesh", "one seed as a closed, checked mesh"),
    "samples sheet": ("eg3d_rlhf.modes.samples:sheet", "contact sheets beside the data, and of shapes"),
    "data convert": (
        "eg3d_rlhf.modes.image_sets:convert",
        "images to the training format (dataset_tool)",
    ),
    "data metrics": (
        "eg3d_rlhf.modes.image_sets:metrics",
        "FID, KID and the offline distances (calc_metrics)",
    ),
}


def command_of(job: str) -> click.Command:
    module, _, name = JOBS[job][0].partition(":")
    return getattr(importlib.import_module(module), name)


class JobGroup(click.Group):
    """Finds a job by its first one or two words, and lists those that begin with `noun`. Nothing of a job is
    imported before it is named.
    """

    def __init__(self, noun: str = "", **kwargs):
        self.noun = noun
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": 140}
        super().__init__(
            noun or PROGRAM,
            subcommand_metavar="JOB [FLAGS]",
            options_metavar="",
            context_settings=settings,
            **kwargs,
        )

    def jobs(self) -> dict[str, str]:
        """Return what follows the noun, for each of its jobs, and the line that says what the job does."""
        start = f"{self.noun} " if self.noun else ""
        return {job.removeprefix(start): line for job, (_, line) in JOBS.items() if job.startswith(start)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.jobs())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a job, or the group of a noun's jobs."""
        job = f"{self.noun} {cmd_name}".strip()
        if job in JOBS:
            return command_of(job)
        group = JobGroup(job, help=f"Jobs of {PROGRAM} {job}.")
        return group if group.jobs() else None

    def invoke(self, ctx: click.Context):
        """Find and run the job; an extra that it needs and that is missing is named."""
        with user_errors():
            return super().invoke(ctx)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        """The longest words that name a job: `label synthetic` is one, whatever follows another `label` goes
        to the labelling command.
        """
        job = " ".join(args[:2])
        if not self.noun and job in JOBS:
            return job, command_of(job), args[2:]
        if not self.noun and args[0] == "label" and len(args) > 1:
            from eg3d_rlhf.modes.annotators import PEOPLE

            if args[1] in PEOPLE:  # annotators are named without waiting for the labelling command
                return job, PEOPLE[args[1]], args[2:]
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            where = f"{PROGRAM} {self.noun}".strip()
            words = [word for word in args[:2] if not word.startswith("-")]
            self.reject_renamed(args)
            meant = "".join(
                f"Did you mean `{job}`? " for job in nearest_jobs(f"{self.noun} {' '.join(words)}")
            )
            click.echo(
                f"Error: {args[0]}: expected a job of {where}, got none of that name. {meant}See {where}"
                " --help.",
                err=True,
            )
            sys.exit(2)
        return super().resolve_command(ctx, args)

    def reject_renamed(self, args: list[str]) -> None:
        """Exit with the present name of a job that version 0.1 had under another name."""
        words = f"{self.noun} {' '.join(args[:2])}".split()[:2]
        if (now := renamed.JOBS.get(" ".join(words))) is not None:
            click.echo(f"Error: {PROGRAM} {' '.join(words)}: has another name now. Run {now}.", err=True)
            sys.exit(2)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the next words of jobs, from the table alone, and what a command itself completes."""
        lines: dict[str, str] = {}
        for job, line in self.jobs().items():
            word, _, rest = job.partition(" ")
            if word.startswith(incomplete):
                lines.setdefault(word, f"{rest}, ..." if rest else line)
        items = [CompletionItem(word, help=line) for word, line in lines.items()]
        return items + (click.Command.shell_complete(self, ctx, incomplete) if ctx.command is self else [])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line a job; nothing is imported."""
        with formatter.section("Jobs"):
            formatter.write_dl(list(self.jobs().items()))


def nearest_jobs(typed: str) -> list[str]:
    """Return the job that is most like what was typed, or none.

    >>> nearest_jobs("sample mesh"), nearest_jobs("repotr evaluate"), nearest_jobs("xyz")
    (['samples mesh'], ['report evaluate'], [])
    """
    words = typed.split()
    nouns = dict.fromkeys(job.split()[0] for job in JOBS)
    # one word may be a noun; of several, what follows a job of one word is an argument of it
    for count in range(len(words), 0, -1):
        if near := difflib.get_close_matches(" ".join(words[:count]), [*JOBS, *nouns], n=1, cutoff=0.7):
            return near
    return []


train = ModeCommand("train")  # as train.py, from any folder
main = version_flag(
    JobGroup(help="Rewards on the density field of 3D-aware generators. Every job takes --help.")
)
