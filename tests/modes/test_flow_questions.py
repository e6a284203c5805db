"""Questions of `flow label` about geometry and texture, and the stages that learn from each."""

import json
import shutil

import pytest

from eg3d_rlhf.people.label.db_flag import open_store
from eg3d_rlhf.people.label.entities import LOCAL, Answer, Choice, Kind
from eg3d_rlhf.tuning.flow.base.family import GEOMETRY, TEXTURE
from eg3d_rlhf.tuning.flow.families import FAMILIES
from eg3d_rlhf.tuning.flow.toy.family import Toy
from eg3d_rlhf.tuning.flow.toy.names import STRUCTURE, VOXELS
from eg3d_rlhf.tuning.flow.workspace.answers import LEFT_OUT, imported_of, repeats_text
from eg3d_rlhf.tuning.flow.workspace.work_folder import Answer as ReadAnswer
from eg3d_rlhf.tuning.flow.workspace.work_folder import Labels, Work
from tests.modes.flow_works import flow, sampled_work
from tests.rejections import check_message

NAMES = [f"{colour} {shape}" for shape in ("ball", "box") for colour in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """WORK with four assets of each of five prompts."""
    return sampled_work(tmp_path_factory.mktemp("questions"), NAMES)


@pytest.fixture
def textured(monkeypatch):
    """A toy whose last stage decides colours alone, as that of TRELLIS.2 does."""
    monkeypatch.setattr(Toy, "textures", (VOXELS,))


@pytest.fixture
def served(monkeypatch):
    """Answers in place of a server: the smaller seed has the better geometry, the larger seed the better
    texture, and both are equal as a whole. Collects the numbers of trials that the page announces.
    """
    announced = []

    def serve(options, *args, on_listening, **kwargs):
        on_listening("http://nowhere")
        store = options.store
        campaign = store.campaign(options.campaign)
        person = store.annotator_without_token(LOCAL, "admin").id
        announced.append((store.progress(campaign.id, person).total, campaign.settings.questions))
        shapes = dict(store.shapes(campaign.id))
        while given := store.assignments(campaign.id, person, 1):
            left, right = (shapes[token] for token in (given[0].left, given[0].right))
            geometry, texture = ("left", "right") if left.seed < right.seed else ("right", "left")
            votes = {GEOMETRY: geometry, TEXTURE: texture}
            asked = {name: votes.get(name, "tie") for name in campaign.settings.questions}
            choice = Choice.TIE if asked else Choice(geometry)
            token = given[0].token
            store.submit(campaign.id, person, Answer(key=token, assignment=token, choice=choice, votes=asked))

    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", serve)
    return announced


def prefers_smaller_seed(imported, stage: str) -> set[bool]:
    """For each pair of a stage, True if the preferred asset has the smaller seed. The assets are named by
    their lines, which are sorted by the seed within each prompt.
    """
    names = (pair.id.partition("/")[2].split(">") for pair in imported.pairs[stage])
    return {int(better) < int(worse) for better, worse in names}


def test_each_stage_learns_from_the_answers_to_its_own_question(sampled, textured, served):
    printed = flow("label", sampled.folder, "--set=campaign=both", "--pairs=14")
    ((total, questions),) = served
    assert questions == (GEOMETRY, TEXTURE)
    assert {str(total), "14"} <= set(printed.replace(";", " ").split())  # what the page announces
    imported = imported_of(sampled, sampled.check_pipeline(), campaigns=("both",))
    assert prefers_smaller_seed(imported, STRUCTURE) == {True}
    assert prefers_smaller_seed(imported, VOXELS) == {False}
    assert len(imported.pairs[STRUCTURE]) == len(imported.pairs[VOXELS]) == 14
    assert imported.report["geometry_ties"] == imported.report["texture_ties"] == 0
    printed = flow("tune", sampled.folder, "--set=campaigns=both", "--pairs-only")
    assert "14 for stage structure" in printed and "14 for stage voxels" in printed
    assert f"{GEOMETRY} for {STRUCTURE}" in printed and f"{TEXTURE} for {VOXELS}" in printed


def test_answers_without_questions_are_about_the_geometry(sampled, textured, served):
    flow("label", sampled.folder, "--set=campaign=old", "--pairs=10", f"--criteria={GEOMETRY}")
    assert served[0][1] == ()
    imported = imported_of(sampled, sampled.check_pipeline(), campaigns=("old",))
    assert set(imported.pairs) == {STRUCTURE} and prefers_smaller_seed(imported, STRUCTURE) == {True}
    assert VOXELS in imported.report[LEFT_OUT]
    rejected = flow("tune", sampled.folder, "--set=campaigns=old", f"--stage={VOXELS}", code=2)
    check_message(rejected, ("--stage", VOXELS, TEXTURE, f"--criteria={GEOMETRY},{TEXTURE}"))
    # the answers of two projects: both questions, and more answers about the geometry
    flow("label", sampled.folder, "--set=campaign=new", "--pairs=6")
    both = imported_of(sampled, sampled.check_pipeline(), campaigns=("old", "new"))
    assert len(both.pairs[STRUCTURE]) >= 10 and len(both.pairs[VOXELS]) == 6
    # a project keeps its questions
    rejected = flow(
        "label", sampled.folder, "--set=campaign=new", f"--criteria={GEOMETRY}", "--pairs=6", code=2
    )
    check_message(rejected, ("--criteria", "'new'", f"{GEOMETRY},{TEXTURE}", GEOMETRY))


def test_a_generator_without_a_stage_of_textures_is_asked_one_question(sampled, served):
    printed = flow("label", sampled.folder, "--set=campaign=one", "--pairs=10")
    total, questions = served[0]
    assert questions == () and {"10", str(total)} <= set(printed.replace(";", " ").split())
    imported = imported_of(sampled, sampled.check_pipeline(), campaigns=("one",))
    assert set(imported.pairs) == {STRUCTURE, VOXELS}
    assert prefers_smaller_seed(imported, VOXELS) == {True}
    rejected = flow("label", sampled.folder, "--set=campaign=x", "--criteria=beauty", code=2)
    check_message(rejected, ("--criteria", "'beauty'", GEOMETRY, TEXTURE))
    missing = flow("tune", sampled.folder, "--set=campaigns=absent", "--pairs-only", code=2)
    check_message(missing, ("labels.db", "'absent'", "--set campaign=absent"))


def test_labels_of_a_file_are_about_the_geometry_unless_a_stage_is_named(sampled, textured, tmp_path):
    path = tmp_path / "scores.jsonl"
    lines = [
        {"asset": str(sampled.asset_folder() / line["look_at"]), "score": line["seed"]}
        for line in sampled.lines()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    family = sampled.check_pipeline()
    imported = imported_of(sampled, family, path)
    assert set(imported.pairs) == {STRUCTURE} and f"--stage={VOXELS}" in imported.report[LEFT_OUT]
    named = imported_of(sampled, family, path, stages=(VOXELS,))
    assert set(named.pairs) == {VOXELS} and LEFT_OUT not in named.report


def test_only_trellis2_has_a_stage_of_textures():
    textures = {name: family.textures for name, family in FAMILIES.items() if family.textures}
    assert textures == {"trellis2": ("texture",)}
    assert set(textures["trellis2"]) < set(FAMILIES["trellis2"].stages)


def labels_with_repeats(folder, equal: int, different: int, tied: int = 0) -> Labels:
    """Answers to pairs that one person answered twice."""
    answers = []
    for number in range(equal + different + tied):
        for repeat in (False, True):
            choice = "tie" if number >= equal + different else "left"
            if repeat and equal <= number < equal + different:
                choice = "right"
            answers.append(
                ReadAnswer(
                    condition="p",
                    left=f"{number}a",
                    right=f"{number}b",
                    choice=choice,
                    annotator="ann",
                    repeat=repeat,
                    time=number + 0.5 * repeat,
                    votes={GEOMETRY: choice},
                )
            )
    return Labels(answers, folder)


def test_repeats_are_compared_with_chance(tmp_path):
    coin = labels_with_repeats(tmp_path, 37, 35)
    assert coin.repeats == (37, 72) and coin.random_repeats == 0.5
    careful = labels_with_repeats(tmp_path, 60, 12)
    assert "not above chance" in repeats_text(coin) and "37 of 72" in repeats_text(coin)
    assert "not above" not in repeats_text(careful)
    # half of the answers are ties: two random answers are equal in 1/4 + 1/8 of the cases
    assert labels_with_repeats(tmp_path, 2, 2, 4).random_repeats == pytest.approx(0.375)
    assert coin.answers_to(TEXTURE).answers == [] and len(coin.answers_to(GEOMETRY).answers) == 144


def test_practice_answers_are_not_counted(sampled, tmp_path, monkeypatch):
    # a copy without the answers of the other tests, which would leave no pair to ask
    shutil.copytree(sampled.folder, tmp_path / "WORK", ignore=shutil.ignore_patterns("labels.db*"))
    sampled = Work.open(tmp_path / "WORK")
    counts = []

    def serve(options, *args, on_listening, **kwargs):
        on_listening("http://nowhere")
        store = options.store
        campaign = store.campaign(options.campaign)
        person = store.annotator_without_token(LOCAL, "admin").id
        for _ in range(4):  # three practice pairs, and a pair
            (given,) = store.assignments(campaign.id, person, 1)
            store.submit(
                campaign.id, person, Answer(key=given.token, assignment=given.token, choice=Choice.LEFT)
            )
        counts.extend(row.kind for row in store.judgements(options.campaign))

    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", serve)
    flow("label", sampled.folder, "--set=campaign=practice", "--pairs=5")
    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", lambda *args, **kwargs: None)
    printed = flow("label", sampled.folder, "--set=campaign=practice", "--pairs=5")
    with open_store(sampled.database, create=False) as store:
        assert sum(row.kind is not Kind.TRAINING for row in store.judgements("practice")) == 1
    assert counts.count(Kind.TRAINING) == 3 and "1 answers" in printed
