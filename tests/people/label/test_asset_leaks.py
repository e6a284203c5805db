"""A blind study of assets does not reveal the generators to annotators: not in bytes, headers or
addresses.
"""

import contextlib
import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf.modes import study as study_job
from eg3d_rlhf.people.label import launch
from eg3d_rlhf.people.label.preparation import AssetPreparer, prepare, prepare_prompts
from eg3d_rlhf.people.label.shape_files import shape_key
from eg3d_rlhf.people.study import design, planning
from eg3d_rlhf.people.study.power import PowerOptions
from tests.people.label import asset_files as files
from tests.people.label import serving
from tests.people.label.serving import answer
from tests.rejections import check_message, raising

NAMES = ("baseline-net", "finetuned-net")
PROMPTS = 3


def folders(root):
    """Two generators' folders: a GLB, splats and a film of each prompt; those of the second are larger."""
    for number, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for prompt in range(PROMPTS):
            seed = 10 * prompt + number
            (root / name / f"glb-{prompt}.glb").write_bytes(
                files.glb(200 + 9000 * number, 16 + 200 * number, "JPEG", seed, noise=True)
            )
            (root / name / f"splat-{prompt}.ply").write_bytes(files.splats(100 + 2000 * number, seed=seed))
        files.write_film(root / name / "film-0.mp4", frames=5 + 30 * number, seed=number)
        (root / name / "only-here.glb" if number else root / name / "other.glb").write_bytes(
            files.glb(seed=90 + number)
        )
    (root / "input.png").write_bytes(files.image_bytes(64))
    asked = [{"prompt": f"glb-{i}", "text": f"thing {i}", "image": "input.png"} for i in range(PROMPTS)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    return root / NAMES[0], root / NAMES[1]


def flags_of(a, b, **more):
    """All flags of the study's command."""
    varying = {"a": str(a), "b": str(b), "n": 7, "annotators_per_pair": 1, "gold_every": 0, **more}
    settings = (*study_job.main.params, *study_job.main.rare.values())
    return launch.with_defaults(
        {p.name: p.default for p in settings} | varying, design.StudyDesign, PowerOptions
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("assets")
    notes = []
    return planning.make_design("blind", flags_of(*folders(root)), notes.append), notes, root


@pytest.fixture(scope="module")
def study(made, tmp_path_factory):
    """An exposed study, prepared, with all that an annotator was sent while she answered everything."""
    designed, _, _ = made
    folder = tmp_path_factory.mktemp("study")
    planned = design.study_pairs(designed)
    progress = {}
    chosen = design.campaign_settings(designed)
    names = ("mode", "extra", "gold_every", "repeat_share", "swap_share", "trials_per_annotator")
    campaign = {name: getattr(chosen, name) for name in names}
    with serving.running(
        folder,
        planned=planned,
        prepared=False,
        exposed=True,
        limits=serving.GENEROUS,
        mode=campaign.pop("mode"),
        campaign=campaign,
    ) as served:
        prepare_prompts(designed.prompts.values(), served.options.cache)
        prepare(
            [shape for pair in planned for shape in (pair.first, pair.second)],
            served.options.cache,
            AssetPreparer(),
            on_progress=progress.update,
        )
        assert progress["finished"] and progress["failed"] == 0, progress
        served.seen = []
        served.pairs = []
        with contextlib.closing(served.browser(served.store.add_annotator("ann"))) as page:
            while pairs := page.get("/api/assignments?count=1").json()["assignments"]:
                served.pairs += pairs
                for path in (
                    f"shapes/{pairs[0]['left']}",
                    f"shapes/{pairs[0]['right']}",
                    f"prompts/{pairs[0]['left']}",
                    "session",
                ):
                    served.seen.append(page.get(f"/api/{path}"))
                served.seen.append(page.get("/api/assignments"))
                served.seen.append(answer(page, pairs[0]["assignment"], f"key-{len(served.pairs)}"))
        yield served


def test_no_response_names_a_generator_a_file_or_what_a_file_says_of_itself(study, made):
    shapes = dict(study.store.shapes(study.campaign))
    words = [files.SECRET, *NAMES, "input.png", "Lavf", "x264", "Exif", "glb-", "splat-", str(made[2])]
    words += [
        word[:10] for shape in shapes.values() for word in (shape.file, shape.generator, shape_key(shape))
    ]
    for response in study.seen:
        for text in (
            str(response.url),
            str(response.headers.multi_items()),
            response.content.decode("latin-1"),
        ):
            assert [word for word in words if word.lower() in text.lower()] == [], response.url
    raw = b"".join(path.read_bytes() for path in made[2].rglob("*") if path.is_file())
    assert raw.count(files.SECRET.encode()) > 50 and b"x264" in raw and b"Exif" in raw  # they were there


def test_the_two_of_a_pair_are_sent_as_prepared_with_the_same_headers(study):
    client = study.client(study.store.add_annotator("ruler"))
    shapes = dict(study.store.shapes(study.campaign))
    for pair in study.store.pairs(study.campaign):
        heads = []
        for asset in pair:
            with client.stream("GET", f"/api/shapes/{asset}") as response:
                data = b"".join(response.iter_raw())
            assert data == study.options.cache.mesh(shapes[asset]).read_bytes()
            varying = {"etag", "x-request-id", "date", "content-length"}
            heads.append([(k, v) for k, v in response.headers.multi_items() if k not in varying])
        assert heads[0] == heads[1]


def test_a_changed_file_is_rejected_and_a_study_is_begun_and_gone_on_with(tmp_path):
    a, b = folders(tmp_path / "assets")
    folder = planning.Folder(tmp_path / "study")
    flags = flags_of(a, b)
    folder.path.mkdir()
    designed = planning.prepare(folder, "s", flags, set(), lambda text: None)
    assert planning.prepare(folder, "s", flags, {"a", "b"}, lambda text: None).hash == designed.hash
    (a / "glb-0.glb").write_bytes(files.glb(seed=77))
    with raising("glb-0.glb"):
        planning.prepare(folder, "s", flags, set(), lambda text: None)


def test_one_generator_and_one_folder_are_rejected(tmp_path):
    a, b = folders(tmp_path / "assets")
    done = CliRunner().invoke(
        study_job.main, [f"--a={a}", f"--outdir={tmp_path / 'x'}", "--n=3", "--dry-run"]
    )
    assert done.exit_code == 2 and list((tmp_path).iterdir()) == [tmp_path / "assets"]
    check_message(done.stderr.splitlines()[-1], ("--a", "--b", "generators", "assets"))
    done = CliRunner().invoke(
        study_job.main, [f"--a={a}", f"--b={b}", f"--outdir={tmp_path / 'x'}", "--n=50", "--dry-run"]
    )
    assert done.exit_code == 2
    check_message(done.stderr.splitlines()[-1], ("--n", "50", "--n=7"))
