"""Entry point of the command eg3d-rlhf, which runs every job of the project by noun and verb.

    eg3d-rlhf                        lists all jobs on one screen
    eg3d-rlhf samples mesh --help    shows the help of one job

Each job is a line of JOBS; its module is imported only when the job runs. The scripts in tools/ are the same
commands under the names that users of EG3D and readers of the papers expect.
"""

import difflib
import importlib
import sys

import click
from click.shell_completion import CompletionItem

from eg3d_rlhf.core import renamed
from eg3d_rlhf.core.cli import ReportsOnce, user_errors, version_flag
from eg3d_rlhf.modes import ModeCommand

PROGRAM = "eg3d-rlhf"

# Words after eg3d-rlhf: (module:click command, what the job does in at most 53 characters).
JOBS: dict[str, tuple[str, str]] = {
    "train": ("eg3d_rlhf.modes.jobs:train", "train or tune a model; --mode selects which kind"),
    "label": ("eg3d_rlhf.modes.label:main", "label shapes or 3D assets in the browser; export"),
    "label synthetic": (
        "eg3d_rlhf.modes.label_files:synthetic",
        "label samples with the simulated annotator",
    ),
    "label elo": ("eg3d_rlhf.modes.label_files:elo", "compute Elo ratings from pairwise judgements"),
    "steer": (
        "eg3d_rlhf.modes.steer:main",
        "move latents along a direction that labels prefer",
    ),
    "study": ("eg3d_rlhf.modes.study:main", "run a blind comparison of two generators with people"),
    "judge calibrate": (
        "eg3d_rlhf.modes.judge:calibrate",
        "measure a vision-language judge against people",
    ),
    "judge audit": (
        "eg3d_rlhf.modes.judge:audit",
        "test whether samples differ enough for a judge",
    ),
    # rewards: training, files and a test before tuning
    "reward train": (
        "eg3d_rlhf.modes.reward_training:train",
        "train a reward on labels of pairs or single shapes",
    ),
    "reward mesh": (
        "eg3d_rlhf.modes.mesh_reward:main",
        "train a mesh reward on unpaired labels (RewardCS)",
    ),
    "reward latent": (
        "eg3d_rlhf.modes.latent_reward:latent",
        "train a reward on the latents of a flow stage",
    ),
    "reward linear": (
        "eg3d_rlhf.modes.reward_linear:linear",
        "fit a linear reward to tens of labels",
    ),
    "reward crop": (
        "eg3d_rlhf.modes.reward_crop:crop_command",
        "draw which part of the shapes a reward reads",
    ),
    "reward join": ("eg3d_rlhf.modes.reward_files:join", "join several rewards into one ensemble file"),
    "reward import": ("eg3d_rlhf.modes.reward_files:release", "convert the paper's released reward"),
    "reward best-of-n": (
        "eg3d_rlhf.modes.best_of_n:main",
        "test how far a reward can be trusted before tuning",
    ),
    # measures on assets and generators of any family
    "check-assets": (
        "eg3d_rlhf.modes.check_assets:main",
        "count the meshes of a folder that are closed solids",
    ),
    "score": ("eg3d_rlhf.modes.score:main", "score generators of any family with one reward"),
    # flow generators: the six commands on a folder WORK, and a check of the generator's folder
    "flow new": ("eg3d_rlhf.modes.flow_new:new", "create a folder WORK for a flow model and its inputs"),
    "flow plan": ("eg3d_rlhf.modes.flow_plan:plan_command", "estimate the cost of all steps in WORK"),
    "flow status": ("eg3d_rlhf.modes.flow_plan:status_command", "show which steps in WORK are done"),
    "flow sample": ("eg3d_rlhf.modes.flow_sample:sample", "generate assets to compare, with their latents"),
    "flow label": ("eg3d_rlhf.modes.flow_label:label", "compare the generated assets in the browser"),
    "flow tune": ("eg3d_rlhf.modes.flow_tune:tune_command", "tune the flow model on the answers"),
    "flow export": (
        "eg3d_rlhf.modes.flow_export:export_command",
        "write the tuned flow model in its released layout",
    ),
    "flow study": ("eg3d_rlhf.modes.flow_study:study", "compare tuned, untuned and control models blind"),
    "flow check": ("eg3d_rlhf.modes.flow_check:check", "check whether a flow model's folder can be used"),
    # reports on tuning runs
    "report evaluate": ("eg3d_rlhf.modes.reports:evaluate", "measure what tuning changed, against a control"),
    "report attribute": (
        "eg3d_rlhf.modes.reports:attribute",
        "attribute the change of the reward to regions",
    ),
    "report embed": ("eg3d_rlhf.modes.reports:embed", "plot tuned samples in the reward's feature space"),
    "report sweep": (
        "eg3d_rlhf.modes.report_studies:sweep",
        "plot reward against distance, over reward weights",
    ),
    "report all": (
        "eg3d_rlhf.modes.report_all:report_all",
        "the four reports above, for a run and its control",
    ),
    "report images": ("eg3d_rlhf.modes.reports:images", "render the final images of a reward run again"),
    "report method": ("eg3d_rlhf.modes.reports:method", "draw the method as one figure"),
    "report seeds": ("eg3d_rlhf.modes.report_studies:seeds", "repeat the demo with several training seeds"),
    "report heads": (
        "eg3d_rlhf.modes.report_shapes:heads",
        "compare heads with the ground truth of their latents",
    ),
    "report latent-search": (
        "eg3d_rlhf.modes.report_shapes:latent_search",
        "measure improved heads, by number of steps",
    ),
    "report solid": (
        "eg3d_rlhf.modes.report_shapes:solid",
        "check whether shapes are closed, standing solids",
    ),
    "report baselines": (
        "eg3d_rlhf.modes.report_baselines:baselines",
        "find the cheapest way that suffices, before tuning",
    ),
    "report controlled-study": (
        "eg3d_rlhf.modes.report_studies:controlled_study",
        "compare labels with controls and baselines",
    ),
    "report steering": (
        "eg3d_rlhf.modes.report_studies:steering",
        "measure steering by the number of labels",
    ),
    "report rewards": (
        "eg3d_rlhf.modes.report_studies:rewards",
        "train every kind of reward and tune with each",
    ),
    # network files
    "generator inspect": (
        "eg3d_rlhf.modes.network_files:inspect_network",
        "show what a network file holds; runs no pickle code",
    ),
    "generator convert": (
        "eg3d_rlhf.modes.network_files:convert",
        "convert to .safetensors, a state dict or a tri-grid",
    ),
    "generator invert": (
        "eg3d_rlhf.modes.inversion:main",
        "reconstruct a shape from an image, with a reward",
    ),
    "generator improve": (
        "eg3d_rlhf.modes.improve:main",
        "improve single samples by a reward; weights stay",
    ),
    # outputs of a generator
    "samples images": ("eg3d_rlhf.modes.samples:images", "render three views of every seed (gen_samples)"),
    "samples videos": ("eg3d_rlhf.modes.samples:videos", "render camera orbits through seeds (gen_videos)"),
    "samples mesh": ("eg3d_rlhf.modes.samples:mesh", "export one seed as a closed, validated mesh"),
    "samples sheet": ("eg3d_rlhf.modes.samples:sheet", "render contact sheets of samples and of shapes"),
    # image sets
    "data convert": (
        "eg3d_rlhf.modes.image_sets:convert",
        "convert images to training format (dataset_tool)",
    ),
    "data metrics": (
        "eg3d_rlhf.modes.image_sets:metrics",
        "compute FID, KID and offline distances (calc_metrics)",
    ),
    "data poses": (
        "eg3d_rlhf.modes.data_poses:poses",
        "crop photographs of faces and estimate their cameras",
    ),
    "data point-maps": (
        "eg3d_rlhf.modes.point_maps:point_maps",
        "make point maps for SAM 3D from depth maps",
    ),
}


def command_of(job: str) -> click.Command:
    """Import the module of a job and return its click command.

    Args:
        job: words of the job, a key of JOBS, such as "samples mesh".
    """
    module_name, _, command_name = JOBS[job][0].partition(":")
    # an entry of JOBS has the form "module:name of the command"
    return getattr(importlib.import_module(module_name), command_name)


class JobGroup(ReportsOnce, click.Group):
    """Click group of all jobs, or of the jobs that share their first word.

    The module of a job is imported only when the job runs or shows its help. The list of the jobs and shell
    completion read the table JOBS alone, so they are fast.

    Args:
        noun: first word of the listed jobs, such as "report"; the empty text lists all jobs.
        kwargs: other arguments of click.Group.
    """

    def __init__(self, noun: str = "", **kwargs):
        self.noun = noun
        # wider than the 80 columns of click, so that help texts wrap less often
        context_settings = {"help_option_names": ["-h", "--help"], "max_content_width": 140}
        super().__init__(
            noun or PROGRAM,
            subcommand_metavar="JOB [FLAGS]",
            # the group has no flags except --help, so the usage line names none
            options_metavar="",
            context_settings=context_settings,
            **kwargs,
        )

    def jobs(self) -> dict[str, str]:
        """Return the jobs of this group: the words that follow the noun, and the description of each job.

        If `noun` is empty, the result holds all jobs under their full names.
        """
        # The prefix ends with a space, so that `report` does not match a longer word.
        prefix = f"{self.noun} " if self.noun else ""
        return {
            job.removeprefix(prefix): description
            for job, (_, description) in JOBS.items()
            if job.startswith(prefix)
        }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of the jobs of this group, in the order of JOBS."""
        return list(self.jobs())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a job if `cmd_name` completes the name of a job.

        If `cmd_name` is only the first word of several jobs, return the group of these jobs. Return None for
        an unknown name.
        """
        job = f"{self.noun} {cmd_name}".strip()
        if job in JOBS:
            return command_of(job)
        # No job has this name, but it may be the first word of several jobs, such as `report`.
        job_group = JobGroup(job, help=f"Jobs of {PROGRAM} {job}.")
        return job_group if job_group.jobs() else None

    def invoke(self, ctx: click.Context):
        """Run the job. Print a user's error in one line on stderr and exit with code 2.

        If an optional package is missing, the message names the extra of this package that installs it.
        """
        with user_errors():
            return super().invoke(ctx)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        """Find the command that the first words of the arguments name.

        The longest matching name wins: `label synthetic` is a job, although `label` is a job, too. Other
        words after `label` are arguments of the command `label`.

        Returns: the name that was found, its command, and the remaining arguments.
        """
        job = " ".join(args[:2])
        if not self.noun and job in JOBS:
            return job, command_of(job), args[2:]
        if not self.noun and args[0] == "label" and len(args) > 1:
            from eg3d_rlhf.modes.annotators import PEOPLE

            # The commands that manage annotators are resolved here, because importing the command `label`
            # takes longer.
            if args[1] in PEOPLE:
                return job, PEOPLE[args[1]], args[2:]
        # While the shell completes a word (resilient parsing), an unknown word is no error.
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            # the command whose list of jobs does not contain the word
            group_command = f"{PROGRAM} {self.noun}".strip()
            # flags are no part of a job's name
            job_words = [word for word in args[:2] if not word.startswith("-")]
            self.reject_renamed(args)
            # empty if no job has a similar name
            suggestion = "".join(
                f"Did you mean `{similar_job}`? "
                for similar_job in nearest_jobs(f"{self.noun} {' '.join(job_words)}")
            )
            click.echo(
                f"Error: {args[0]} is not a job of {group_command}. {suggestion}For a list, run"
                f" {group_command} --help.",
                err=True,
            )
            # exit code 2: wrong usage, as in click
            sys.exit(2)
        return super().resolve_command(ctx, args)

    def reject_renamed(self, args: list[str]) -> None:
        """End the program with exit code 2 if the arguments name a job by its name in version 0.1.

        The message gives the present name. If no job had this name, the function returns.
        """
        # Names of jobs have at most two words.
        job_words = f"{self.noun} {' '.join(args[:2])}".split()[:2]
        if (new_job := renamed.JOBS.get(" ".join(job_words))) is not None:
            click.echo(f"Error: {PROGRAM} {' '.join(job_words)} has been renamed. Run {new_job}.", err=True)
            sys.exit(2)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the completions of the next word of a job's name, and of the flags of this group.

        The words are read from the table JOBS, so no module of a job is imported.
        """
        # next word -> description
        descriptions: dict[str, str] = {}
        for job, description in self.jobs().items():
            next_word, _, second_word = job.partition(" ")
            # `report evaluate`, `report all` and others share the completion `report`. `setdefault` keeps
            # the first of them as an example in the description.
            if next_word.startswith(incomplete):
                descriptions.setdefault(next_word, f"{second_word}, ..." if second_word else description)
        completions = [
            CompletionItem(next_word, help=description) for next_word, description in descriptions.items()
        ]
        # click calls this method also for the parent groups of a command. Only the group at the end of the
        # typed words (`ctx.command`) completes its flags.
        return completions + (
            click.Command.shell_complete(self, ctx, incomplete) if ctx.command is self else []
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of the jobs in --help, one line per job, without importing their modules."""
        with formatter.section("Jobs"):
            formatter.write_dl(list(self.jobs().items()))


def nearest_jobs(typed_words: str) -> list[str]:
    """Find the job, or the first word of jobs, whose name is most similar to the typed words.

    Args:
        typed_words: words of the user, separated by spaces; trailing words may be arguments of a job.

    Returns: a list with one name, or an empty list if no name is similar.

    >>> nearest_jobs("sample mesh"), nearest_jobs("repotr evaluate"), nearest_jobs("xyz")
    (['samples mesh'], ['report evaluate'], [])
    """
    words = typed_words.split()
    # first words of the jobs, without repetitions and in order
    nouns = dict.fromkeys(job.split()[0] for job in JOBS)
    # Try the most words first: the words that follow the name of a job are its arguments.
    for word_count in range(len(words), 0, -1):
        # .7 is stricter than difflib's default of .6, so that unrelated words get no suggestion
        if matching_names := difflib.get_close_matches(
            " ".join(words[:word_count]), [*JOBS, *nouns], n=1, cutoff=0.7
        ):
            return matching_names
    return []


train = ModeCommand("train")  # the same command as train.py, for use from any folder
main = version_flag(
    JobGroup(help="Tune 3D generators with rewards learned from preferences. Every job takes --help.")
)
