"""Working through a plan: in order, once each, on from where it was, past what cannot be drawn."""

import pytest

from eg3d_rlhf.people.label.preparation import ShapeProgress, prepare, progress_file
from eg3d_rlhf.people.label.shape_files import ShapeCache, shape_key
from tests.people.label.plans import numbered


class Recorder:
    """Draws a few bytes; refuses the seeds that have no surface."""

    def __init__(self, without_surface: tuple[int, ...] = (), lost: tuple[int, ...] = ()):
        self.drawn: list[int] = []
        self.pictures: list[int] = []
        self._without, self._lost = without_surface, lost

    def generator(self, shape):
        if shape.seed in self._lost:
            raise FileNotFoundError("network.safetensors is gone")

    def mesh(self, shape) -> bytes:
        self.drawn.append(shape.seed)
        if shape.seed in self._without:
            raise ValueError("the level is not crossed")
        return shape_key(shape).encode()

    def picture(self, shape) -> bytes:
        self.pictures.append(shape.seed)
        return b"png"


@pytest.fixture
def cache(tmp_path) -> ShapeCache:
    return ShapeCache(tmp_path)


def test_shapes_are_drawn_in_order_and_each_once(cache):
    shapes, drawer = [*numbered(3, 5), *numbered(5, 4)], Recorder()
    prepare(shapes, cache, drawer)
    assert drawer.drawn == [5, 6, 7, 4, 8] and drawer.pictures == []
    assert all(cache.mesh(shape).read_bytes() == shape_key(shape).encode() for shape in shapes)


def test_what_is_there_is_not_drawn_again(cache):
    shapes = numbered(4)
    prepare(shapes[1:3], cache, Recorder())
    drawer = Recorder()
    prepare(shapes, cache, drawer)
    assert drawer.drawn == [0, 3]


def test_pictures_are_added_to_shapes_that_have_none(cache):
    shapes, drawer = numbered(2), Recorder()
    prepare(shapes, cache, Recorder())
    prepare(shapes, cache, drawer, renders=True)
    assert drawer.drawn == [] and drawer.pictures == [0, 1] and cache.render(shapes[1]).read_bytes() == b"png"


def test_a_shape_counts_as_prepared_only_with_its_picture(cache):
    """The server looks for the mesh alone, so that comes last."""
    seen = []

    class Watched(Recorder):
        def mesh(self, shape):
            seen.append(cache.mesh(shape))
            return super().mesh(shape)

    shape = numbered(1)[0]
    put = cache.put_mesh
    cache.put_mesh = lambda *args: (seen.append(cache.render(shape)), put(*args))
    prepare([shape], cache, Watched(), renders=True)
    assert seen[0] is None and seen[1] is not None


def test_a_shape_that_cannot_be_drawn_is_noted_once_and_passed_over(cache):
    shapes, drawer = numbered(5), Recorder(without_surface=(1, 3))
    told: list[dict] = []
    for _ in range(2):
        prepare(shapes, cache, drawer, tell=told.append)
    assert drawer.drawn == [0, 1, 2, 3, 4] and told[-1] == {**told[-1], "done": 3, "failed": 2, "total": 5, "finished": True}
    assert cache.failure(shapes[3]) == "the level is not crossed" and cache.mesh(shapes[3]) is None and cache.mesh(shapes[4]) is not None


def test_a_lost_generator_stops_the_work_and_is_held_against_no_shape(cache):
    shapes = numbered(3)
    with pytest.raises(FileNotFoundError):
        prepare(shapes, cache, Recorder(lost=(1,)))
    assert cache.failure(shapes[1]) is None
    drawer = Recorder()
    prepare(shapes, cache, drawer)
    assert drawer.drawn == [1, 2]


def test_the_progress_adds_up_after_every_shape(cache):
    told: list[dict] = []
    prepare(numbered(2), cache, Recorder())
    prepare(numbered(6), cache, Recorder(without_surface=(4,)), tell=told.append)
    assert [(t["done"], t["failed"]) for t in told] == [(2, 0), (3, 0), (4, 0), (4, 1), (5, 1)]
    assert told[0]["seconds_per_shape"] is None and told[0]["seconds_left"] is None and told[-1]["seconds_left"] == 0.0
    for t in told[1:]:
        assert t["seconds_left"] == pytest.approx(t["seconds_per_shape"] * (t["total"] - t["done"] - t["failed"]))
    assert [t["finished"] for t in told] == [False] * 4 + [True]


def test_progress_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "progress.json"
    assert ShapeProgress.read(path) is None
    progress = ShapeProgress(campaign="one", done=1, total=3, seconds_per_shape=0.5)
    progress.write(path)
    assert ShapeProgress.read(path) == progress
    path.write_text('{"campaign": "one", "colour": 3}')
    assert ShapeProgress.read(path) is None


def test_campaigns_that_share_a_cache_have_progress_of_their_own(cache):
    files = {progress_file(cache, url, name) for url in ("sqlite:///a.db", "postgresql://u:secret@h/d") for name in ("one", "two")}
    assert len(files) == 4 and not any("secret" in path.name for path in files)
