"""Embeddings of prompts and images from files, and the requirements of CLIP and DINOv2."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eg3d_rlhf.tuning.flow.base.conditioning import (
    Conditioning,
    read_array,
    read_conditioning,
    write_conditioning,
)
from eg3d_rlhf.tuning.flow.families import encoders
from tests.rejections import raising
from tests.tuning.flow.families.trellis.tiny_trellis import write_hub

TOKENS = torch.arange(12.0).view(3, 4)


def test_one_file_of_all(tmp_path):
    name = "a chair, red / blue"
    given = Conditioning(tokens={name: TOKENS, "": TOKENS + 1}, encoder="clip")
    write_conditioning(tmp_path / "c.safetensors", given)
    got = read_conditioning(tmp_path / "c.safetensors")
    assert got.names == (name,) and got.encoder == "clip"
    assert torch.equal(got.select([name]), TOKENS[None])
    assert torch.equal(got.null(2), (TOKENS + 1).expand(2, -1, -1))


def test_a_folder_of_files(tmp_path):
    torch.save(TOKENS.bfloat16()[None], tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", TOKENS.numpy())
    np.savez(tmp_path / "c.npz", cond=TOKENS.numpy())
    save_file({"tokens": TOKENS}, tmp_path / "d.safetensors")
    got = read_conditioning(tmp_path)
    assert got.names == ("a", "b", "c", "d") and torch.equal(got.select("abcd"), TOKENS.expand(4, -1, -1))
    assert not got.null(1).any()
    torch.save(TOKENS, tmp_path / "null.pt")
    assert torch.equal(read_conditioning(tmp_path, zero_null=False).null(1), TOKENS[None])


def test_unsuitable_embeddings_are_rejected(tmp_path):
    with raising(".pt", ".npy", str(tmp_path), kind=FileNotFoundError):
        read_conditioning(tmp_path)
    with raising("conditioning", "''"):
        Conditioning(tokens={"a": TOKENS})
    with raising("conditioning", "'a'"):
        Conditioning(tokens={"a": TOKENS / 0}, zero_null=True)
    with raising("[2, 4]; [3, 4]"):
        Conditioning(tokens={"a": TOKENS, "b": TOKENS[:2]}, zero_null=True)
    with raising("conditioning", "'x'"):
        Conditioning(tokens={"a": TOKENS}, zero_null=True).select(["a", "x"])


def test_unsuitable_arrays_are_rejected(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with raising("two.npz", "mean", "'a', 'b'"):
        read_array(tmp_path / "two.npz", "mean")
    assert len(read_array(tmp_path / "two.npz", "a")) == 1
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    (tmp_path / "broken.pt").write_bytes(b"PK")
    for name in ("objects.npy", "broken.pt"):
        with raising(name):
            read_array(tmp_path / name)
    with raising(str(tmp_path / "none.npy"), kind=FileNotFoundError):
        read_array(tmp_path / "none.npy")
    (tmp_path / "a.txt").write_text("")
    with raising("a.txt", ".pt", ".npy", ".npz", ".safetensors"):
        read_array(tmp_path / "a.txt")


def test_encoders_without_their_package_or_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with raising("transformers", "eg3d-rlhf[vision]"):
        encoders.TextEncoder("openai/clip-vit-large-patch14")

    for name in ("TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    with raising("hub/checkpoints/dinov2_vitl14_reg4_pretrain.pth", kind=FileNotFoundError):
        encoders.ImageEncoder()


@pytest.fixture
def image_encoder(monkeypatch, tmp_path):
    """Return a DINOv2 of random weights in torch hub's layout, for images of 28 pixels."""
    write_hub(tmp_path / "hub" / "checkpoints" / "dinov2_vitl14_reg4_pretrain.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return encoders.ImageEncoder()


def test_image_tokens_are_normalised_without_parameters_and_patches_are_not(image_encoder):
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tokens = image_encoder(images)
    before = image_encoder.tokens(images)
    assert tokens.shape == (1, 9, 64) and float(tokens.mean(2).abs().max()) < 1e-5  # 1 + 4 + 2 x 2
    torch.testing.assert_close(
        tokens, (before - before.mean(2, True)) / (before.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    )
    assert torch.equal(image_encoder.patches(images)[0, :, 1, 0], before[0, 7])
    model = image_encoder.model
    torch.testing.assert_close(model(images), model.layernorm(before))  # what is read is before the last norm


def test_images_by_name_are_cut_out_and_their_empty_conditioning_is_zeros(image_encoder, tmp_path):
    image = Image.new("RGBA", (100, 60), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (40, 20, 60, 40))
    image.save(tmp_path / "a.png")
    made = image_encoder.embed({"a": tmp_path / "a.png"})
    assert made.zero_null and made.form == [9, 64]


def test_text_tokens_are_padded_and_include_the_empty_text(monkeypatch):
    class Tokenizer:
        def __call__(self, texts, **options):
            assert options == {
                "max_length": 77,
                "padding": "max_length",
                "truncation": True,
                "return_tensors": "pt",
            }
            return {"input_ids": torch.tensor([[len(t)] * 77 for t in texts])}

    class Clip(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids):
            return type("Out", (), {"last_hidden_state": input_ids[..., None].half().expand(-1, -1, 4)})

    monkeypatch.setattr(
        encoders, "pretrained", lambda kind, name: Tokenizer() if kind == "AutoTokenizer" else Clip()
    )
    embedded = encoders.TextEncoder("clip").embed(["chair", "boat", "chair"])
    assert (
        embedded.names == ("chair", "boat")
        and float(embedded.select(["chair"])[0, 0, 0]) == 5
        and not embedded.null(1).any()
    )


def test_dinov2s_files_that_do_not_fit(tmp_path):
    path = write_hub(tmp_path / "dinov2.pth")
    state = torch.load(path, weights_only=True)
    torch.save({name: x for name, x in state.items() if name != "blocks.1.norm1.bias"}, path)
    with raising("missing: encoder.layer.1.norm1.bias"):
        encoders.ImageEncoder(str(path))
    torch.save({"blocks.0.mlp.w12.weight": torch.ones(2, 2)}, path)
    with raising("DINOv2", "cls_token"):
        encoders.ImageEncoder(str(path))
    (tmp_path / "folder").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "folder" / "model.safetensors")
    with raising("config.json", "model.safetensors", kind=FileNotFoundError):
        encoders.ImageEncoder(str(tmp_path / "folder"))
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "vit"}')
    with raising("DINOv2", "model_type", "dinov2"):
        encoders.ImageEncoder(str(tmp_path / "folder"))
