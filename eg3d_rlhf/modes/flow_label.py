"""The job `flow label`: people compare the generated assets of a WORK folder in the browser.

The pairs and the answers are stored in WORK/labels.db as a labelling project, which the database calls a
campaign. `flow tune` reads the answers.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from eg3d_rlhf.core.cli import GroupedCommand, check_extra, choose_device, option
from eg3d_rlhf.modes.flow_next import new_folder_command, tune_command
from eg3d_rlhf.modes.flow_sample import device_flag, work_argument
from eg3d_rlhf.modes.judge_labelling import (
    answer_with_judge,
    judge_labelling_options,
    judge_request,
    read_calibration,
)
from eg3d_rlhf.modes.label_origin import labels_from_option
from eg3d_rlhf.modes.shared_flags import FILE
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.db_flag import EXTRA, open_store
from eg3d_rlhf.people.label.entities import QUESTIONS, CampaignSettings, parse_questions
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.preferences.pair_strategies import STRATEGIES
from eg3d_rlhf.tuning.flow.base.family import GEOMETRY, TEXTURE, question_of
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.workspace.work_folder import REWARD, Work


@click.command("label", cls=GroupedCommand)
@work_argument
@option(
    "--pairs",
    metavar="N",
    type=click.IntRange(1),
    show_default="the number of assets",
    help="Number of pairs of assets to compare.",
)
@option(
    "--strategy",
    metavar="NAME",
    default="random",
    help=(
        f"Strategy that chooses the pairs: {', '.join(STRATEGIES)}, or the name of a plugin's strategy."
        " active chooses pairs on which rewards disagree, and close chooses pairs with similar scores; both"
        f" need trained rewards in WORK/{REWARD}."
    ),
)
@option(
    "--criteria",
    metavar="LIST",
    show_default="geometry; geometry,texture for a generator with a stage of textures",
    help=(
        "Questions about each pair, separated by commas. Each stage learns from the answers to its own"
        " question: stages of textures from texture, all others from geometry. Other questions are"
        f" {', '.join(name for name in QUESTIONS if name not in (GEOMETRY, TEXTURE))} and NAME=TEXT, whose"
        " answers are stored and exported, and are not used for tuning."
    ),
)
@device_flag
@option(
    "--campaign",
    rare=True,
    metavar="NAME",
    show_default="the project of WORK",
    help=(
        "Name of the labelling project (campaign) in labels.db. A new name starts a further project on the"
        " same assets."
    ),
)
@option(
    "--export",
    metavar="FILE",
    type=FILE,
    show_default="none",
    help=(
        "Write the answers to FILE (.jsonl) instead of collecting any: one line per answer with winner,"
        " loser, prompt, criterion, annotator and provenance, where provenance names people or a judge."
    ),
)
@labels_from_option()
@judge_labelling_options()
@launch.server_options("access.jsonl in WORK")
@click.pass_context
def label(
    ctx: click.Context,
    folder: Path,
    pairs: int | None,
    strategy: str,
    criteria: str | None,
    device: str,
    campaign: str | None,
    export: Path | None,
    labels_from: str,
    **server_values,
) -> None:
    """Compare the generated assets in the browser: each page shows two assets of the same prompt. The command
    prints the address of the page.

    \b
    Example:
        eg3d-rlhf flow label WORK
        eg3d-rlhf flow label WORK --strategy=active --set campaign=more
        eg3d-rlhf flow label WORK --export=pairs.jsonl --labels-from=all
    """
    # Fails at once if the packages of the label server are not installed.
    check_extra(EXTRA)
    work = Work.open(folder)
    judge = judge_request(ctx, server_values, work.database)
    if judge is not None:
        read_calibration(judge)  # raises ValueError for a file that is no calibration of this judge
    if export is not None:
        export_answers(work, export, campaign or work.campaign, labels_from, launch.given_flags(ctx))
        return
    if "labels_from" in launch.given_flags(ctx):
        raise ValueError("--labels-from applies to --export only. Remove it, or pass --export=FILE.")
    server_flags = launch.ServerFlags.from_flags(server_values, folder)
    # one line per generated asset
    asset_count = len(work.lines())
    # WORK has a default campaign; others are made with --set campaign=NAME
    campaign_name = campaign or work.campaign
    questions = choose_questions(work, criteria)
    request = make_request(work, campaign_name, pairs or asset_count, strategy, questions)
    with open_store(work.database, create=True) as store:
        # Annotators on other machines must log in, so at least one must exist before the server starts.
        if server_flags.exposed:
            launch.check_annotators(
                store, server_flags.host, f"eg3d-rlhf label add-annotator NAME --db={work.database}"
            )
        stored_campaign = store.campaign(campaign_name)
        if stored_campaign is None:
            # Imported here, so that --help and errors are printed without loading this module.
            from eg3d_rlhf.tuning.flow.workspace.answered import answered_judgements, count_open_pairs
            from eg3d_rlhf.tuning.flow.workspace.answers import check_trained, latent_ensemble

            # active strategies need trained rewards, which the first answers provide
            if STRATEGIES[strategy].least_rewards:
                check_trained(work, strategy)
            # loaded only if the strategy scores pairs
            load_scorer = partial(latent_ensemble, work, choose_device(device))
            # Pairs that were answered in earlier projects are not asked again, because they would only repeat
            # answers.
            earlier_judgements = answered_judgements(work, question_names(questions))
            if earlier_judgements:
                open_count = count_open_pairs(work, question_names(questions))
                if open_count <= 0:
                    raise ValueError(
                        f"--set campaign={campaign_name}: every pair of the {asset_count} sampled assets was"
                        f" answered in an earlier labelling project. Sample assets of more {work.kind_word},"
                        f" in a new folder: {new_folder_command(work)}"
                    )
                click.echo(
                    f"pairs that were answered in earlier labelling projects are left out; {open_count}"
                    " others can be asked"
                )
            store.create_campaign(
                *launch.plan_campaign(store, request, click.echo, load_scorer, earlier_judgements)
            )
            stored_campaign = store.campaign(campaign_name)
            assert stored_campaign is not None
        else:
            # An existing campaign resumes, so its pairs and its strategy cannot change. `check_resumed`
            # raises ValueError if a given flag differs from the stored value.
            requested_settings = {"pairs": pairs, "strategy": strategy, "questions": list(questions)}
            # the flag --criteria sets the stored value "questions"
            given_flags = {{"criteria": "questions"}.get(name, name) for name in launch.given_flags(ctx)}
            launch.check_resumed(stored_campaign, requested_settings, given_flags, "--set campaign=NAME")
        click.echo(question_line(work, stored_campaign.settings.questions))
        click.echo(launch.campaign_line(store, stored_campaign))
        if judge is not None:
            answer_with_judge(store, campaign_name, judge)
            calibration_flag = (
                f"--calibration={judge.calibration}" if judge.calibration else "--calibration=FILE"
            )
            click.echo(f"next: {tune_command(work, campaign_name)} --labels-from=judges {calibration_flag}")
            return
        # Serves the page until Ctrl-C. The lambda returns the lines that are printed at the start.
        launch.serve_campaign(
            store,
            work.database,
            campaign_name,
            server_flags,
            lambda address: [
                f"label at {address}  (Ctrl-C stops)",
                f"next: {tune_command(work, campaign_name)}",
            ],
            "answer",
        )


def export_answers(
    work: Work, path: Path, campaign_name: str, labels_from: str, given_names: set[str]
) -> None:
    """Write the answers of a labelling project as lines of pairs (`store_labels.export_pairs`).

    Args:
        work: the opened folder WORK.
        path: file with the suffix .jsonl.
        campaign_name: name of the project.
        labels_from: whose answers are written: "people", "judges" or "all".
        given_names: names of the flags that were typed.

    Raises: ValueError for another suffix, for flags that have no effect on an export, or if nothing is
    written.
    """
    # imported here, because --help must not load this module
    from eg3d_rlhf.people.label.entities import Mode
    from eg3d_rlhf.people.label.store_labels import LabelFilters, export_pairs, store_label_use

    unused_names = given_names - {"folder", "export", "labels_from", "campaign"}
    if unused_names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unused_names))
        raise ValueError(f"{flags} cannot be combined with --export, which collects no answers. Remove it.")
    if path.suffix != ".jsonl":
        raise ValueError(f"--export: the name {path.name} does not end in .jsonl. Choose such a name.")
    if not (work.folder / "labels.db").is_file():
        raise FileNotFoundError(
            f"--export: {work.folder} has no answers yet. Collect them with eg3d-rlhf flow label"
            f" {work.folder}"
        )
    with open_store(work.database, create=False) as store:
        filters = LabelFilters(campaign=campaign_name, labels_from=labels_from)
        written = export_pairs(store, path, campaign=campaign_name, labels_from=labels_from)
        use = store_label_use(store, filters, Mode.LABEL)
    click.echo(f"{written}: {use.text('answers')}")


def choose_questions(work: Work, criteria: str | None) -> tuple[str, ...]:
    """Return the further questions of a labelling project, in the form that its settings have.

    The question of a project without further questions, which shape is better, is about the geometry.

    Args:
        work: the opened folder WORK.
        criteria: value of --criteria, or None for the questions from which the stages of WORK learn.

    Raises: ValueError for an unknown question.
    """
    family = family_of(Path(work.pipeline), print_line=lambda licence: None)
    if criteria is None:
        stage_questions = {question_of(family, stage) for stage in work.stages}
        questions = tuple(name for name in (GEOMETRY, TEXTURE) if name in stage_questions)
    else:
        questions = tuple(name.strip() for name in criteria.split(",") if name.strip())
        parse_questions(questions)
    return () if questions == (GEOMETRY,) else questions


def question_names(questions: Sequence[str]) -> list[str]:
    """Return the names of the further questions of a labelling project, without their texts."""
    return [question.name for question in parse_questions(questions)]


def question_line(work: Work, questions: Sequence[str]) -> str:
    """Return a line with the questions of a labelling project, and the stages that learn from each.

    Args:
        work: the opened folder WORK.
        questions: further questions in the settings of the project.
    """
    family = family_of(Path(work.pipeline), print_line=lambda licence: None)
    names = [question.name for question in parse_questions(questions)] or [GEOMETRY]
    texts = []
    for name in (*names, *(["overall"] if questions else [])):
        # Without a question about the geometry, the answer as a whole takes its place.
        source = GEOMETRY if name == "overall" and GEOMETRY not in names else name
        stages = [stage for stage in work.stages if question_of(family, stage) == source]
        use = (
            f"for stage {' and '.join(stages)}" if stages else "stored and exported; no stage learns from it"
        )
        texts.append(f"{name} ({use})")
    unasked_stages = [stage for stage in work.stages if question_of(family, stage) not in (GEOMETRY, *names)]
    unasked_text = f"; no question is about {' and '.join(unasked_stages)}" if unasked_stages else ""
    return f"questions: {', '.join(texts)}{unasked_text}"


def make_request(
    work: Work,
    campaign_name: str,
    pair_count: int,
    strategy: str = "random",
    questions: tuple[str, ...] = (),
) -> launch.Request:
    """Build the description of a new labelling project on the generated assets of WORK.

    Args:
        work: the opened folder WORK.
        campaign_name: name of the project.
        pair_count: number of pairs.
        strategy: name of the strategy that chooses the pairs.
        questions: further questions, see `choose_questions`.
    """
    # None for every setting: `with_defaults` replaces it by the default value of the setting
    campaign_settings = {
        **launch.with_defaults(dict.fromkeys(launch.SETTINGS), CampaignSettings),
        **launch.ASKED,
        "questions": questions,
    }
    pairing_options = PairingOptions(pairs=pair_count, seed=work.seed, strategy=strategy)
    # an absolute path, because the label server may be started in another folder
    asset_folder = str(work.asset_folder().resolve())
    return launch.Request(
        name=campaign_name,
        network=None,
        after=None,
        pairing=pairing_options,
        settings=campaign_settings,
        assets=asset_folder,
        up=work.up,
        # samples without a surface are left out instead of rejected
        lenient=True,
    )
