"""The names that EG3D users' code imports."""

import pytest

import dnnlib
from tests.rejections import raising


def test_easydict_is_dict_and_attributes():
    d = dnnlib.EasyDict(a=1)
    d.b = 2
    assert d == {"a": 1, "b": 2} and d.a == 1
    del d.a
    with pytest.raises(AttributeError):
        _ = d.a


def test_classes_are_constructed_by_name():
    layer = dnnlib.construct_class_by_name(
        3, 5, class_name="training.layers.FullyConnectedLayer", activation="lrelu"
    )
    assert layer.weight.shape == (5, 3)
    assert dnnlib.get_obj_by_name("torch.nn.functional.softplus").__name__ == "softplus"


@pytest.mark.parametrize("name", ["os.system", "subprocess.run", "builtins.eval", "nodots"])
def test_other_packages_are_out_of_reach(name):
    with raising("torch_utils", repr(name)):
        dnnlib.get_obj_by_name(name)


def test_open_url_reads_local_files_only(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    assert dnnlib.open_url(str(path)).read() == b"x" and dnnlib.open_url(path.as_uri()).read() == b"x"
    with raising("'https://example.org/network.pkl'"):
        dnnlib.open_url("https://example.org/network.pkl")
