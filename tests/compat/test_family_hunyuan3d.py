"""Hunyuan3D-2.1 against values of the original's own classes (fixtures/flow_hunyuan3d); case.json says what
its keys mean.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from scipy.spatial import cKDTree

from eg3d_rlhf.models import hunyuan3d
from eg3d_rlhf.models.dino import Dino
from eg3d_rlhf.models.hunyuan3d import Denoiser, ShapeDecoder, ShapeEncoder, choose_points, embedded
from eg3d_rlhf.models.image_preprocessing import on_white, over_white, place_in_square
from eg3d_rlhf.models.lora import adapter_state, merged_state
from eg3d_rlhf.models.policies import (
    ADAPTER,
    CONFIG,
    PREFIX,
    load_weights,
    read_weights,
    split_state,
    tuned_model,
    write_adapter,
)
from eg3d_rlhf.models.weights import empty, entries_below, read_content, shapes
from eg3d_rlhf.modes.flow_check import check
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, read_conditioning
from eg3d_rlhf.tuning.flow.base.export import export
from eg3d_rlhf.tuning.flow.base.sampling import generate, times, trajectory
from eg3d_rlhf.tuning.flow.families import family_of
from eg3d_rlhf.tuning.flow.families import hunyuan3d as family
from eg3d_rlhf.tuning.flow.families import hunyuan3d_files as layout
from eg3d_rlhf.tuning.flow.workspace.work_folder import Work
from tests.compat.family_reference import (
    at_least,
    cases,
    check_gradients,
    error,
    grad_norm,
    gradients,
    pictures_of,
    recorded,
    released,
    rounding_of,
    surfaces,
    table,
)
from tests.compat.family_tolerances import (
    ADAPTED,
    DECODED,
    ENCODER,
    GRADIENT,
    HALF,
    TOKENS,
    TRAJECTORY,
    VELOCITY,
)
from tests.rejections import raising
from tests.tuning.flow.documented_commands import run_section

COUNTS = 2  # of 255, of pictures


case = cases("flow_hunyuan3d")


@pytest.fixture(scope="module")
def root(case):
    """The folder as it is released: case.json names the one with config.yaml in it."""
    case.file(f"{case.fact('root')}/{case.fact('checkpoint')}")
    return case.folder if case.fact("root") == layout.FOLDER else case.folder / case.fact("root")


@pytest.fixture(scope="module")
def opened(root):
    files = layout.read_files(root)
    return files, layout.read_sections(files.checkpoint)


@pytest.fixture
def model(opened):
    return layout.denoiser(*opened)


@pytest.fixture(scope="module")
def decoder(opened):
    return layout.decoder(*opened)


def configured(path, tmp_path):
    """What config.yaml says, without a checkpoint."""
    (tmp_path / layout.CONFIG).write_text(yaml.safe_dump(json.loads(path.read_text())))
    (tmp_path / layout.CHECKPOINTS[0]).touch()
    return layout.read_files(tmp_path)


RELEASED = pytest.mark.parametrize("path", released("flow_hunyuan3d"))


@RELEASED
@pytest.mark.parametrize("section", ["model", "vae", "conditioner"])
def test_names_and_shapes_are_the_originals(path, section, tmp_path):
    files = configured(path, tmp_path)
    want = table(path.with_name(f"{path.stem}__{section}.tsv"))
    if section == "model":
        assert shapes(empty(lambda: Denoiser(files.model)).state_dict()) == want
    elif section == "vae":
        halves = [
            empty(lambda kind=kind: kind(files.vae)).state_dict() for kind in (ShapeDecoder, ShapeEncoder)
        ]
        assert not halves[0].keys() & halves[1].keys() and shapes(halves[0] | halves[1]) == want
    else:
        listed = {name: torch.empty(shape, device="meta") for name, shape in want.items()}
        assert all(name.startswith(layout.ENCODER) for name in listed)
        assert shapes(entries_below(listed, layout.ENCODER)) == shapes(
            empty(lambda: Dino(files.encoder)).state_dict()
        )


@RELEASED
def test_the_released_settings_are_resolved_as_the_original_does(path, tmp_path):
    files = configured(path, tmp_path)
    config = json.loads(path.read_text())
    shown = config["conditioner"]["params"]["main_image_encoder"]["kwargs"]
    patches = (shown.get("image_size", 224) // shown["config"]["patch_size"]) ** 2
    assert files.tokens == [
        patches + shown.get("use_cls_token", True),
        config["model"]["params"]["context_dim"],
    ]
    cut, shift = (config.get(section, {}).get("params", {}) for section in ("image_processor", "scheduler"))
    shift = shift.get("shift", 1.0)
    assert (files.image_size, files.border, files.shift) == (
        cut.get("size", 512),
        cut.get("border_ratio", 0.15),
        shift,
    )
    made = family.sampling(files.shift)
    assert (made.steps, made.cfg_strength, made.cfg_interval, made.rescale_t) == (
        49,
        4.0,
        (0.0, 1.0),
        1 / shift,
    )
    pipeline = family.ShapePipeline(files, empty(lambda: Denoiser(files.model)), None, lambda name: None)
    (stage,) = pipeline.stages
    assert (stage.latents.tokens, stage.latents.channels) == (files.model.input_size, files.model.in_channels)
    assert stage.data_at_one and (stage.path.schedule, stage.path.sigma_min) == ("uniform", 0.0)


def test_velocity_blocks_and_the_token_of_the_time(case, model):
    x, t, cond = case.of("x", "t", "cond")
    made = []
    token = []
    hooks = [
        block.register_forward_hook(lambda module, given, out: made.append(out)) for block in model.blocks
    ]
    hooks.append(model.t_embedder.register_forward_hook(lambda module, given, out: token.append(out)))
    hooks.append(model.t_embedder.mlp.register_forward_pre_hook(lambda module, given: token.append(given[0])))
    with torch.no_grad():
        y = model(x, t, {"main": cond})
        assert error(y, case["y"]) < VELOCITY
        for name, value in zip(("t_sincos", "t_token"), token, strict=True):
            if name in case:
                assert error(value, case[name]) < VELOCITY, name
        made.clear()
        # blocks_out is of one sample, at the time of another
        of = {"sample": 0, "time": 1} | case.facts.get("blocks_of", {})
        sample = slice(of["sample"], of["sample"] + 1)
        model(x[sample], t[of["time"]].reshape(1), {"main": cond[sample]})
    for hook in hooks:
        hook.remove()
    assert error(torch.stack(made), case["blocks_out"]) < VELOCITY


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients(case, model, recompute):
    x, t, cond, weight = case.of("x", "t", "cond", "grad_weight")
    model.requires_grad_(True).train().recompute = recompute
    x = x.requires_grad_()
    cond = cond.requires_grad_()
    total = (model(x, t, {"main": cond}) * weight).sum()
    total.backward()
    assert error(x.grad, case["grad_x"]) < GRADIENT and error(cond.grad, case["grad_cond"]) < GRADIENT
    assert total.item() == pytest.approx(
        float(case["grad_scalar"]), abs=VELOCITY * float((weight * case["y"]).abs().sum())
    )
    check_gradients(gradients(model), case.below("grad/"))
    assert grad_norm(model) == pytest.approx(float(case["grad_norm"]), rel=GRADIENT)


def test_the_path_and_its_loss(case, root, model):
    data, noise, t, cond = case.of("fm_x0", "fm_noise", "fm_t", "cond")
    (stage,) = family.ShapePipeline(
        layout.read_files(root), model.requires_grad_(True).train(), None, lambda name: None
    ).stages
    ours = 1 - t
    x_t = stage.path.mix(data, ours, noise)
    assert (
        error(x_t, case["fm_x_t"]) < VELOCITY
        and error(-stage.path.velocity(data, noise), case["fm_target"]) < VELOCITY
    )
    v = stage.velocity(x_t, ours, {"main": cond})
    assert error(-v, case["fm_pred"]) < VELOCITY
    errors = stage.path.errors(v, data, noise)
    assert error(errors, case["fm_loss_each"]) < VELOCITY and error(errors.mean(), case["fm_loss"]) < VELOCITY
    errors.mean().backward()
    gate = [block.moe.gate.weight for block in model.blocks if block.mixture]
    checked = {"fm_grad_block0_to_q": model.blocks[0].attn1.to_q.weight} | (
        {"fm_grad_gate": gate[-1]} if gate else {}
    )
    for name, parameter in checked.items():
        if name in case:
            assert error(parameter.grad, case[name]) < GRADIENT, name
    assert grad_norm(model) == pytest.approx(float(case["fm_grad_norm"]), rel=GRADIENT)


def test_the_original_balances_its_experts_by_a_term_that_is_left_out_here(case, model):
    """0.01 sum_e mean(p_e) f_e, f_e the share of choices that fell on e, times X: from what the gates are
    given.
    """
    if not any(block.mixture for block in model.blocks):
        pytest.skip(f"{case.folder.name} has no experts")
    terms = []
    factor = case.facts.get("balance", 0.01)

    def balance(gate, given, out):
        p = torch.nn.functional.linear(given[0], gate.weight).softmax(-1)
        experts = len(gate.weight)
        share = torch.nn.functional.one_hot(out[1], experts).double().mean((0, 1)) * experts
        terms.append(factor * (p.mean(0) * share.to(p)).sum())

    for block in model.requires_grad_(True).train().blocks:
        if block.mixture:
            block.moe.gate.register_forward_hook(balance)
    x_t, t, cond, target = case.of("fm_x_t", "fm_t", "cond", "fm_target")
    loss = (model(x_t, t, {"main": cond}) - target).square().mean()
    assert error(torch.stack(terms), case["fm_aux_loss"]) < VELOCITY
    (loss + sum(terms)).backward()
    assert error(model.blocks[0].attn1.to_q.weight.grad, case["fm_aux_grad_block0_to_q"]) < GRADIENT
    assert grad_norm(model) == pytest.approx(float(case["fm_aux_grad_norm"]), rel=GRADIENT)


def test_samplers(case, opened, model):
    files, _ = opened
    (stage,) = family.ShapePipeline(files, model, None, lambda name: None).stages
    for name in case.names:
        if name.startswith("smp_times_"):
            points = replace(stage.sampling, steps=int(name.removeprefix("smp_times_")) - 1)
            made = 1 - torch.tensor([*times(points), 0.0], dtype=torch.float64)
            assert error(made, case[name]) < VELOCITY, name
    noise, cond = case.of("smp_noise", "smp_cond")
    tried = 0
    for name, asked in case.fact("samplings").items():
        w = asked["guidance"] - 1 if asked["guidance"] >= 0 else 0.0
        if w < 0 or f"smp_{name}_out" not in case:
            continue  # guidance of 0..1 is refused here
        tried += 1
        sampling = replace(stage.sampling, steps=asked["points"] - 1, cfg_strength=w)
        assert (
            error(1 - torch.tensor([*times(sampling), 0.0], dtype=torch.float64), case[f"smp_{name}_times"])
            < VELOCITY
        )
        null = {"main": torch.zeros_like(cond)}
        states = [x for x, _ in trajectory(stage, noise, {"main": cond}, null, sampling)]
        made = torch.stack(recorded([*states, states[-1]], asked))
        assert error(made, case[f"smp_{name}_x_t"]) < TRAJECTORY, name
        assert error(states[-1], case[f"smp_{name}_out"]) < TRAJECTORY
    if not tried:
        pytest.skip(f"{case.folder.name} has no trajectory of a guidance that is sampled here")


def picture_encoder(case, opened):
    """Load the encoder of pictures; skip the test where the checkpoint has none."""
    if layout.CONDITIONER not in opened[1]:
        pytest.skip(f"{case.folder.name} has no encoder of pictures in its checkpoint")
    return layout.image_encoder(*opened)


def test_pictures(case, opened):
    """Opaque ones, too: refused as files, not by the way they are cut out."""
    files, sections = opened
    network = picture_encoder(case, opened)
    for k in pictures_of(case):
        square = place_in_square(case[f"pre{k}_rgba"].numpy(), files.border)
        picture, mask = on_white(
            Image.fromarray(case[f"pre{k}_rgba"].numpy()), files.image_size, files.border
        )
        made = {"square": over_white(square), "square_mask": square[..., 3], "image": picture, "mask": mask}
        for name, pixels in made.items():
            want = case[f"pre{k}_{name}"].numpy()
            assert pixels.shape == want.shape and np.abs(pixels.astype(int) - want).max() <= COUNTS, name
        with torch.no_grad():
            tokens = family.image_tokens(files, network, family.as_image(case[f"pre{k}_image"].numpy()))
        assert error(tokens, case[f"pre{k}_tokens"]) < TOKENS


def test_tokens_and_the_empty_condition(case, opened):
    files, _ = opened
    with torch.no_grad():
        tokens = family.image_tokens(files, picture_encoder(case, opened), case["enc_image"] / 2 + 0.5)
    assert error(tokens, case["enc_tokens"]) < TOKENS and list(tokens.shape[1:]) == files.tokens
    null = Conditioning(tokens={"a": {"main": tokens[0]}}, zero_null=True).null(len(tokens))["main"]
    assert torch.equal(null, case["enc_null"])


def cut_out(case):
    """Return the numbers of pictures that are not opaque."""
    kinds = [k for k, kind in enumerate(case.fact("pictures")) if kind != "opaque"]
    return kinds or pytest.skip(f"{case.folder.name} has no picture that is cut out")


def test_a_picture_becomes_the_tokens_that_files_of_conditions_hold(case, root, opened, tmp_path):
    """By the command's own way, from a file; pictures are within two counts, so tokens differ a little."""
    picture_encoder(case, opened)
    kinds = cut_out(case)
    paths = {}
    for k in kinds:
        paths[str(k)] = tmp_path / f"{k}.png"
        Image.fromarray(case[f"pre{k}_rgba"].numpy()).save(paths[str(k)])
    made = family.FAMILY.embed_images(root, paths, torch.device("cpu"))
    for k in kinds:
        assert error(made.tokens[str(k)]["main"], case[f"pre{k}_tokens"][0]) < HALF
    family.FAMILY.load(root, made)
    other = made.encoder.replace("border", "margin")
    with raising("conditioning:", made.encoder, other, "eg3d-rlhf"):
        family.FAMILY.load(root, Conditioning(tokens=made.tokens, encoder=other, zero_null=True))


def test_decoder_at_points(case, decoder):
    latents, points = case.of("dec_latents", "dec_points")
    with torch.no_grad():
        tokens = decoder(latents)
        assert (
            error(tokens, case["dec_tokens"]) < VELOCITY
            and error(embedded(points, decoder.config), case["dec_embedded"]) < VELOCITY
        )
        assert error(decoder.geo_decoder(points, tokens), case["dec_logits"]) < VELOCITY


def test_the_surface_is_the_originals_on_a_straight_grid(case, decoder):
    """Published vertices are index / n * 2 b - b, not index / (n - 1); ours are closed at the border of the
    box.
    """
    latents = case["dec_latents"][0]
    if "dec_level" in case and float(case["dec_level"]):
        pytest.skip(f"{case.folder.name}: its surface is not at 0, the pipeline's own level")
    cells = case.fact("octree_resolution")
    bound = case.fact("bounds")
    n = cells + 1
    if bound != family.BOUND:
        pytest.skip(f"{case.folder.name}: its box is +-{bound}, not the pipeline's own")
    with torch.no_grad():
        axis = torch.linspace(-bound, bound, n)
        grid = decoder.slab(decoder(latents[None]), axis, slice(0, n))
    assert error(grid, case["dec_grid"][0]) < DECODED
    vertices, faces = family.ShapeAsset(latents, decoder).surface(cells)
    published = case["dec_vertices"].double().numpy()
    theirs = case["dec_faces"].numpy()
    straight = (published + bound) * n / (n - 1) - bound
    step = 2 * bound / cells

    def inside(points):
        return (np.abs(points) < bound - 1e-3 * step).all(-1)

    ours = vertices.astype(np.float64)
    away, number = cKDTree(ours).query(straight[inside(straight)])
    assert away.max() < 1e-4 and cKDTree(straight).query(ours[inside(ours)])[0].max() < 1e-4
    known = dict(zip(np.flatnonzero(inside(straight)).tolist(), number.tolist(), strict=True))
    turned = {frozenset(face): tuple(face) for face in faces.tolist()}
    same = other = 0
    for face in theirs.tolist():
        if all(corner in known for corner in face):
            mapped = [known[corner] for corner in face]
            if frozenset(mapped) in turned:
                start = turned[frozenset(mapped)].index(mapped[0])
                same += [*turned[frozenset(mapped)][start:], *turned[frozenset(mapped)][:start]] == mapped
                other += 1
    assert same == other > 0  # faces that both cut alike, seen from the same side


def test_encoder_from_chosen_points_on(case, opened, monkeypatch):
    """And latents as the flow sees them, which the decoder divides by scale_factor."""
    queries, points, mean = case.of("vae_query", "vae_data", "vae_mean")
    network = layout.encoder(*opened)
    monkeypatch.setattr(hunyuan3d, "choose_points", lambda surface, config, draw: (queries[0], points[0]))
    assert error(network.latents(points[0], None) / network.config.scale_factor, mean[0]) < ENCODER
    with torch.no_grad():
        assert error(network.encoder(queries, points), case["vae_encoded"]) < ENCODER
        for name, made in zip(("mean", "logvar"), network(queries, points), strict=True):
            assert error(made, case[f"vae_{name}"]) < ENCODER


def test_points_are_chosen_as_many_as_the_original_chooses(case, opened):
    files, _ = opened
    surface, points, queries = (value[0] for value in case.of("vae_surface", "vae_data", "vae_query"))
    made = choose_points(surface, files.vae, torch.Generator().manual_seed(1))
    assert [len(part) for part in made] == [len(queries), len(points)]
    rows = {tuple(row) for row in surface.tolist()}
    asked, kept = ({tuple(row) for row in part.tolist()} for part in made)
    assert asked <= kept <= rows


@pytest.fixture
def adapter(case, tmp_path):
    """PEFT's folder."""
    lora = case.fact("lora")
    (tmp_path / "PEFT").mkdir()
    (tmp_path / "PEFT" / ADAPTER).write_bytes(case.file(lora["file"]).read_bytes())
    settings = {
        "peft_type": "LORA",
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": lora["targets"],
        "bias": "none",
    }
    (tmp_path / "PEFT" / CONFIG).write_text(json.dumps(settings))
    return tmp_path / "PEFT"


def test_adapters_are_pefts(case, model, adapter, tmp_path):
    x, t, cond = case.of("x", "t", "cond")
    tuned = tuned_model(model, adapter)
    with torch.no_grad():
        assert error(tuned(x, t, {"main": cond}), case["lora_y"]) < ADAPTED
        model.load_state_dict(merged_state(tuned))
        assert error(model(x, t, {"main": cond}), case["lora_y"]) < ADAPTED
    written, given = (
        read_content(path / ADAPTER, "test") for path in (write_adapter(tuned, tmp_path / "ours"), adapter)
    )
    assert (
        shapes(split_state(given, "PEFT")[0]) == {}
        and {f"{PREFIX}{name}" for name in adapter_state(tuned)} == written.keys()
    )
    assert written.keys() == given.keys() and all(torch.equal(written[name], given[name]) for name in given)


@pytest.mark.parametrize("whole", [True, False])
def test_an_exported_folder_is_the_originals_with_merged_weights(
    case, root, opened, adapter, tmp_path, whole
):
    """Two files in the released subfolder, so that the original's loader finds them by the path alone."""
    files, sections = opened
    report = export(
        family_of(root if whole else files.root),
        root if whole else files.root,
        tmp_path / "TUNED",
        {"shape": adapter},
    )
    folder = tmp_path / "TUNED" / layout.FOLDER
    assert {path.name for path in folder.iterdir()} == {layout.CONFIG, case.fact("checkpoint")}
    assert (tmp_path / "TUNED" / "Notice").is_file() and 0 <= report["tuned"]["shape"]["rounding"] < 1
    assert (folder / layout.CONFIG).read_bytes() == (files.root / layout.CONFIG).read_bytes()
    made = layout.read_sections(folder / case.fact("checkpoint"))
    for section, state in sections.items():
        assert shapes(made[section]) == shapes(state)
        assert all(made[section][name].dtype == tensor.dtype for name, tensor in state.items())
    changed = {
        name for name, tensor in sections["model"].items() if not torch.equal(tensor, made["model"][name])
    }
    assert {name.rpartition(".")[0] for name in changed} == set(read_weights(adapter).adapters)
    assert all(
        torch.equal(tensor, made[section][name])
        for section in sections.keys() - {"model"}
        for name, tensor in sections[section].items()
    )
    x, t, cond = case.of("x", "t", "cond")
    with torch.no_grad():
        again = layout.denoiser(layout.read_files(tmp_path / "TUNED"), made)
        limit = rounding_of(sections["model"].values())
        assert error(again(x, t, {"main": cond}), case["lora_y"]) < limit


def test_the_folder_is_found_fit(root):
    done = CliRunner().invoke(check, [str(root)])
    assert done.exit_code == 0 and "hunyuan3d" in done.output and "FAULT" not in done.output, done.output


@pytest.mark.long
def test_from_pictures_to_a_tuned_folder_as_documented(case, root, opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(family, "CELLS", 12)  # of meshes that nobody looks at
    picture_encoder(case, opened)
    shown = at_least(3, cut_out(case))
    Path("IMAGES").mkdir()
    for name, (k, shift) in shown.items():
        Image.fromarray(np.roll(case[f"pre{k}_rgba"].numpy(), shift, 1)).save(f"IMAGES/{name}.png")

    def look(called, done):
        if called == "sample":
            rows = Work.open(Path("WORK")).lines()
            heard(rows)
            assert {row["condition"] for row in rows} < set(shown)
            assert all(row["look_at"].endswith(".obj") for row in rows)

    few = "--steps=2 --batch=2 --lr=0.02 --set=warmup=0 --set=choose_noises=0 --device=cpu".split()
    with surfaces(case) as heard:
        called = run_section("Hunyuan3D-2.1", root, Path(), few, look)
    assert called == ["new", "sample", "pairs", "train", "export"]
    read = read_conditioning(Path("WORK"))
    tuned = family.FAMILY.load(Path("TUNED"), read)
    assert generate(tuned, [read.names[0]], [0])[0].latent.isfinite().all()


def test_a_checkpoint_in_float16_as_released(case, opened, adapter, tmp_path):
    files, sections = opened
    (tmp_path / "ROOT" / layout.FOLDER).mkdir(parents=True)
    (tmp_path / "ROOT" / layout.FOLDER / layout.CONFIG).write_bytes((files.root / layout.CONFIG).read_bytes())
    nested = {
        section: {name: tensor.half() for name, tensor in state.items()}
        for section, state in sections.items()
    }
    torch.save(nested, tmp_path / "ROOT" / layout.FOLDER / layout.CHECKPOINTS[0])
    export(family_of(tmp_path / "ROOT"), tmp_path / "ROOT", tmp_path / "TUNED", {"shape": adapter})
    made = layout.read_files(tmp_path / "TUNED")
    assert made.checkpoint == tmp_path / "TUNED" / layout.FOLDER / "model.fp16.ckpt"
    x, t, cond = case.of("x", "t", "cond")
    held = layout.read_sections(made.checkpoint)
    assert all(tensor.dtype == torch.float16 for state in held.values() for tensor in state.values())
    with torch.no_grad():
        model = layout.denoiser(made, held, torch.float32)
        assert error(model(x, t, {"main": cond}), case["lora_y"]) < HALF
        plain = layout.denoiser(files, nested, torch.float32)
        assert error(load_weights(plain, read_weights(adapter))(x, t, {"main": cond}), case["lora_y"]) < HALF
