"""Embeddings of conditions from files, and what CLIP and DINOv2 need to be there."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eg3d_rlhf.flow.embeddings import Conditions, read_array, read_conditions, write_conditions
from eg3d_rlhf.flow.trellis import conditions as encoders

TOKENS = torch.arange(12.0).view(3, 4)


def test_one_file_of_all(tmp_path):
    given = Conditions(tokens={"a chair, red / blue": TOKENS, "": TOKENS + 1}, encoder="clip")
    write_conditions(tmp_path / "c.safetensors", given)
    got = read_conditions(tmp_path / "c.safetensors")
    assert got.names == ("a chair, red / blue",) and got.encoder == "clip" and got.size == 4
    assert torch.equal(got.of(["a chair, red / blue"]), TOKENS[None]) and torch.equal(got.null(2), (TOKENS + 1).expand(2, -1, -1))


def test_a_folder_of_files(tmp_path):
    torch.save(TOKENS.bfloat16()[None], tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", TOKENS.numpy())
    np.savez(tmp_path / "c.npz", cond=TOKENS.numpy())
    save_file({"tokens": TOKENS}, tmp_path / "d.safetensors")
    got = read_conditions(tmp_path)
    assert got.names == ("a", "b", "c", "d") and torch.equal(got.of("abcd"), TOKENS.expand(4, -1, -1))
    assert not got.null(1).any()
    torch.save(TOKENS, tmp_path / "null.pt")
    assert torch.equal(read_conditions(tmp_path, zero_null=False).null(1), TOKENS[None])


def test_what_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="conditions: expected a file or a folder of .pt, .npy"):
        read_conditions(tmp_path)
    with pytest.raises(ValueError, match="expected the embedding of the empty text"):
        Conditions(tokens={"a": TOKENS})
    with pytest.raises(ValueError, match="expected finite embeddings, got others for 'a'"):
        Conditions(tokens={"a": TOKENS / 0}, zero_null=True)
    with pytest.raises(ValueError, match=r"all alike, got shapes \[2, 4\], \[3, 4\]"):
        Conditions(tokens={"a": TOKENS, "b": TOKENS[:2]}, zero_null=True)
    with pytest.raises(ValueError, match="expected embeddings of all names, got none for 'x'"):
        Conditions(tokens={"a": TOKENS}, zero_null=True).of(["a", "x"])


def test_arrays_that_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(ValueError, match="expected an array mean alone, got 'a', 'b'"):
        read_array(tmp_path / "two.npz", "mean")
    assert len(read_array(tmp_path / "two.npz", "a")) == 1
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "broken.pt").write_bytes(b"PK")
    for name in ("objects.npy", "broken.pt"):
        with pytest.raises(ValueError, match=f"{name}: expected an array, got a damaged or foreign file"):
            read_array(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="array: expected a file, got none at"):
        read_array(tmp_path / "none.npy")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="expected one of .pt, .npy, .npz, .safetensors"):
        read_array(tmp_path / "a.txt")


def test_encoders_without_their_package_or_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="expected the transformers package to embed conditions, got none"):
        encoders.TextEncoder("openai/clip-vit-large-patch14")

    class Absent:
        def from_pretrained(self, name, local_files_only):
            assert local_files_only
            raise OSError(f"{name} is not cached")

    monkeypatch.setitem(sys.modules, "transformers", type("T", (), {"AutoModel": Absent()}))
    with pytest.raises(ValueError, match=r"expected its weights on this machine, got none \(facebook/dinov2-with-registers-large"):
        encoders.ImageEncoder()


class FakeDino(torch.nn.Module):
    """Tokens that tell patches apart; no norm."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.device = torch.device("cpu")

    def forward(self, pixel_values, output_hidden_states):
        assert output_hidden_states
        means = torch.nn.functional.avg_pool2d(pixel_values, 14).flatten(2).transpose(1, 2)  # [N, 1369, 3]
        return type("Out", (), {"hidden_states": [torch.zeros(1), torch.cat([means.new_full((len(means), 5, 3), 9.0), means], 1)]})


@pytest.fixture
def image_encoder(monkeypatch):
    monkeypatch.setattr(encoders, "pretrained", lambda kind, name: FakeDino())
    return encoders.ImageEncoder()


def test_image_tokens_are_normalised_without_parameters_and_patches_are_not(image_encoder):
    images = torch.rand(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    tokens = image_encoder(images)
    assert tokens.shape == (1, 1374, 3) and float(tokens[0, 5:].mean(1).abs().max()) < 1e-5
    patches = image_encoder.patches(images)
    assert patches.shape == (1, 3, 37, 37)
    assert torch.allclose(patches[0, 0, 2, 5], (images[0, 0, 28:42, 70:84].mean() - 0.485) / 0.229, atol=1e-5)


def test_images_are_cut_out_over_black(image_encoder):
    image = Image.new("RGBA", (100, 60), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (40, 20, 60, 40))
    shown = encoders.cut_out(image)
    assert shown.shape == (3, 518, 518) and float(shown[1:].max()) == 0
    assert abs(float(shown[0].mean()) - (20 / 22) ** 2) < 0.01  # 20 pixels, of which 1.2 x (20 - 1) are 22
    assert image_encoder.conditions({"a": image}).zero_null
    with pytest.raises(ValueError, match="expected a transparent background"):
        encoders.cut_out(image.convert("RGB"))
    with pytest.raises(ValueError, match="expected something that is not transparent"):
        encoders.cut_out(Image.new("RGBA", (8, 8), (0, 0, 0, 10)))
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (3, 3, 5, 5))
    with pytest.raises(ValueError, match="expected something larger than two pixels"):
        encoders.cut_out(image)


@pytest.mark.parametrize(
    ("place", "crop"),  # pixels shown: first and last of x, of y; and the square cut out, by hand
    [((40, 59, 20, 39), (38, 18, 60, 40)), ((0, 30, 5, 14), (-3, -8, 33, 28)), ((10, 31, 7, 8), (8, -4, 32, 20))],
)
def test_the_square_and_its_pixels_are_those_of_trellis(place, crop):
    left, right, top, bottom = place
    pixels = np.zeros((60, 100, 4), np.uint8)
    y, x = np.mgrid[:60, :100]
    pixels[..., :3] = np.stack([2 * x + 20, 4 * y, 128 + 60 * np.sin(x / 9) * np.cos(y / 7)], -1)
    pixels[top : bottom + 1, left : right + 1, 3] = 205 + (x + y)[top : bottom + 1, left : right + 1] % 50
    pixels[max(top - 1, 0), left : right + 1, 3] = np.maximum(pixels[max(top - 1, 0), left : right + 1, 3], 204)  # not quite opaque enough
    room = np.pad(pixels, ((60, 60), (60, 60), (0, 0)))
    x0, y0, x1, y1 = (v + 60 for v in crop)
    square = Image.fromarray(room[y0:y1, x0:x1]).resize((518, 518), Image.Resampling.LANCZOS)
    rgb, alpha = (np.asarray(part, np.float32) / np.float32(255) for part in (square.convert("RGB"), square.getchannel("A")))
    want = np.floor(rgb * alpha[..., None] * np.float32(255)) / np.float32(255)
    got = encoders.cut_out(Image.fromarray(pixels))
    assert np.array_equal(got.permute(1, 2, 0).numpy(), want.astype(np.float32)) and got.max() > 0.5


def test_text_tokens_are_padded_and_include_the_empty_text(monkeypatch):
    class Tokenizer:
        def __call__(self, texts, **options):
            assert options == {"max_length": 77, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
            return {"input_ids": torch.tensor([[len(t)] * 77 for t in texts])}

    class Clip(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids):
            return type("Out", (), {"last_hidden_state": input_ids[..., None].half().expand(-1, -1, 4)})

    monkeypatch.setattr(encoders, "pretrained", lambda kind, name: Tokenizer() if kind == "AutoTokenizer" else Clip())
    found = encoders.TextEncoder("clip").conditions(["chair", "boat", "chair"])
    assert found.names == ("chair", "boat") and float(found.of(["chair"])[0, 0, 0]) == 5 and not found.null(1).any()


def test_the_real_networks_of_transformers(tmp_path):
    """Of random weights: what is read is DINOv2 before its last norm, and CLIP's last hidden states."""
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Dinov2WithRegistersConfig(image_size=518, patch_size=14, num_register_tokens=4, **small)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dino")
    encoder = encoders.ImageEncoder(str(tmp_path / "dino"))
    image = torch.rand(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokens(image)
    assert tokens.shape == (1, 1374, 16) and encoder.patches(image).shape == (1, 16, 37, 37)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoders.MEAN, encoders.STD))
    with torch.no_grad():
        last = encoder.model(pixel_values=(image - mean) / std).last_hidden_state
        assert torch.allclose(encoder.model.layernorm(tokens), last, atol=1e-5)
