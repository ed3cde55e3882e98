"""Conversion in both directions against transformers and timm: same outputs, same arrays.

Models are tiny and random. Norms and gains are random too: at their initial values they hide
mistakes.
"""

import argparse
import copy
import functools
import json
import os
import pickle
import re
from operator import attrgetter

import jax
import numpy as np
import pytest

from mim_jax import UserError, pictures, schema
from mim_jax.convert import __main__ as convert
from mim_jax.convert import check, from_torch, to_torch
from mim_jax.convert.files import load_weights, save_weights
from mim_jax.convert.network import Network
from mim_jax.convert.read import read
from mim_jax.convert.states import sines
from mim_jax.data.classes import palette
from mim_jax.inspect import main as inspect
from mim_jax.models.dvae import dvae
from mim_jax.models.vit import vit
from mim_jax.objectives import segment
from mim_jax.train import TrainState
from mim_jax.transfer import start_from
from tests.official import mae_shapes, to_params
from tests.timm_models import timm_models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch_models = pytest.importorskip("mim_jax.convert.torch_models")

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
SHAPE |= dict(image_size=32, patch_size=8, layer_norm_eps=1e-6)
DECODER = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
SHARED = dict(vocab_size=64, use_shared_relative_position_bias=True, use_mask_token=True)
ABSOLUTE = dict(vocab_size=64, use_absolute_position_embeddings=True, use_mask_token=True)
OWN = dict(use_relative_position_bias=True, num_labels=3)
HUGGING_FACE = {  # a class, the settings of its config
    "mae": ("ViTMAEForPreTraining", {f"decoder_{k}": v for k, v in DECODER.items()}),
    "mae_encoder": ("ViTMAEModel", {}),
    "vit": ("ViTForImageClassification", dict(num_labels=3)),
    "vit_encoder": ("ViTModel", {}),
    "beit_shared": ("BeitForMaskedImageModeling", SHARED),
    "beit_absolute": ("BeitForMaskedImageModeling", ABSOLUTE | dict(layer_scale_init_value=0.0)),
    "beit_mean": ("BeitForImageClassification", OWN),
    "beit_cls": ("BeitForImageClassification", OWN | dict(use_mean_pooling=False)),
    "beit_encoder": ("BeitModel", OWN),
}
CONFIGS = {"ViTMAE": "ViTMAEConfig", "ViT": "ViTConfig", "Beit": "BeitConfig"}


def randomize(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in module.named_parameters():
            x.copy_(0.3 * torch.randn(x.shape, generator=generator))
            x.add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if hasattr(module, "decoder"):
            fix_positions(module)
    return module.eval()


def fix_positions(module):
    """Sets the positions of Hugging Face's MAE to sines and cosines, in its own dtype."""
    places = (module.vit.embeddings, "position_embeddings"), (module.decoder, "decoder_pos_embed")
    for place, name in places:
        table = getattr(place, name)
        table.data = torch.tensor(sines((4, 4), table.shape[-1]), dtype=table.dtype)


@functools.cache
def hugging_face(name):
    kind, settings = HUGGING_FACE[name]
    family = next(family for family in CONFIGS if kind.startswith(family))
    config = getattr(transformers, CONFIGS[family])(**SHAPE, **settings)
    return randomize(getattr(transformers, kind)(config))


def written(module, folder) -> dict[str, np.ndarray]:
    """Returns what save_pretrained writes, with the decoder's names before transformers 5."""
    module.save_pretrained(folder)
    arrays, _ = read(folder / "model.safetensors")
    return {
        name.replace("decoder_encoder.layer", "decoder_layers"): x for name, x in arrays.items()
    }


def theirs(module, batch) -> dict[str, np.ndarray]:
    """Returns the outputs of a model of transformers in float64."""
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    noise, masked = torch.tensor(batch["noise"]), torch.tensor(batch["masked"])
    options, name = {}, type(module).__name__
    if name == "BeitForMaskedImageModeling":
        options = dict(bool_masked_pos=masked)
    elif name.startswith("ViTMAE"):
        options = dict(noise=noise)
    with torch.no_grad():
        if name == "ViTMAEModel":  # it hides patches by default
            module.config.mask_ratio = 0.0
            options = dict(noise=torch.arange(16.0)[None] + 0 * noise)
        outputs = module(images, **options)
        if name == "ViTMAEForPreTraining":
            latent = module.vit(images, noise=noise).last_hidden_state
            return dict(latent=latent.numpy(), predictions=outputs.logits.numpy())
    if "logits" in outputs:
        return dict(logits=outputs.logits.numpy())
    return dict(tokens=outputs.last_hidden_state.numpy())


def exact(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def assert_same_numbers(ours, theirs):
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=1e-8 * np.abs(x).max(), err_msg=name)


def assert_identical(state, other):
    assert state.keys() == other.keys()
    for name, x in state.items():
        assert x.dtype == other[name].dtype, name
        np.testing.assert_array_equal(x, other[name], err_msg=name)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_in_both_directions(name, tmp_path):
    module = hugging_face(name)
    state = written(module, tmp_path)
    params, network = from_torch(state, heads=4, decoder_heads=2)
    pooler = [key for key in state if "pooler.dense" in key]  # of a ViT; never trained
    assert sorted(key.removeprefix("vit.") for key in network.left_out) == sorted(pooler)
    back = to_torch(params, network, layout="hf")
    assert_identical(back, {key: x for key, x in state.items() if key not in pooler})
    # transformers 5 has other names in memory, and in MAE's files
    renamed = {
        key.replace("decoder_layers", "decoder_encoder.layer"): x for key, x in state.items()
    }
    for other in (module.state_dict(), renamed):
        again, _ = from_torch(other, heads=4, decoder_heads=2)
        jax.tree.map(np.testing.assert_array_equal, again, params)

    double = type(module)(module.config).double().eval()
    double.load_state_dict(module.state_dict())
    if name == "mae":  # positions in float64, as ours
        fix_positions(double)
    batch = check.example(network)
    assert_same_numbers(check.run(exact(params), network, batch), theirs(double, batch))


TIMM = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=3)
RELATIVE = dict(use_abs_pos_emb=False, init_values=0.1)
TIMMS = {
    "vit_mean": ("vision_transformer.VisionTransformer", dict(global_pool="avg")),
    "vit_cls": ("vision_transformer.VisionTransformer", dict(init_values=0.1)),
    "vit_encoder": ("vision_transformer.VisionTransformer", dict(num_classes=0)),
    "beit_own": ("beit.Beit", RELATIVE | dict(use_rel_pos_bias=True)),
    "beit_shared": ("beit.Beit", RELATIVE | dict(use_shared_rel_pos_bias=True)),
    "beit_absolute": ("beit.Beit", dict(global_pool="token")),
    "hybrid": (  # an odd number of rows
        "vision_transformer_hybrid.vit_base_r50_s16_224",
        dict(img_size=(48, 32), patch_size=1, depth=1),
    ),
}


@pytest.mark.parametrize("name", TIMMS)
def test_timm_in_both_directions(name, monkeypatch):
    kind, settings = TIMMS[name]
    module = randomize(attrgetter(kind)(timm_models())(**TIMM | settings))
    state, size = module.state_dict(), settings.get("img_size")
    params, network = from_torch(
        {f"module.{key}": x for key, x in state.items()}, heads=4, size=size
    )
    back = to_torch(params, network, layout="timm")
    assert_identical(back, {key: x.numpy() for key, x in state.items()})
    module, batch = module.double(), check.example(network)
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        answers = dict(tokens=module.forward_features(images), logits=module(images))
    if name == "vit_encoder":
        del answers["logits"]
    ours = check.run(exact(params), network, batch)
    assert_same_numbers(ours, {key: x.numpy() for key, x in answers.items()})
    for ran in ("timm ", "plain torch"):  # --check with timm, and without it
        title, far = check.differences(params, network, "timm")
        assert title.startswith(ran)
        assert max(far.values()) < check.TOLERANCE
        monkeypatch.setattr(torch_models, "of_timm", lambda *_: None)


def official_mae() -> dict[str, np.ndarray]:
    shape = dict(width=32, depth=2, decoder_width=16, decoder_depth=1, patch=(8, 8), channels=3)
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=s).astype(np.float32) for name, s in mae_shapes(**shape).items()}
    tables = {"pos_embed": sines((4, 4), 32), "decoder_pos_embed": sines((4, 4), 16)}
    return state | {name: table.astype(np.float32) for name, table in tables.items()}


def test_the_official_mae():
    """A checkpoint as its training code writes it, against an independent table of names."""
    state = official_mae()
    optimizer = {"state": {0: {"exp_avg": np.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    whole = {"model": {f"module.{k}": x for k, x in state.items()}, "optimizer": optimizer}
    params, network = from_torch(whole | {"epoch": 3}, heads=4, decoder_heads=2)
    assert (network.layout, network.kind, network.grid) == ("mae", "mae", (4, 4))
    assert network.encoder.positions == "sincos"
    assert network.left_out == ("optimizer.state.0.exp_avg",)
    learned = {k: x for k, x in state.items() if "pos_embed" not in k}
    jax.tree.map(np.testing.assert_array_equal, params, to_params(learned))
    assert_identical(to_torch(params, network, layout="mae"), state)
    # Other positions than MAE's are learned ones; the row of the class token counts
    state["pos_embed"] = state["pos_embed"] + np.float32(1e-3) * (np.arange(17) == 0)[:, None]
    params, network = from_torch(state, heads=4, decoder_heads=2)
    assert network.encoder.positions == "learned"
    assert_identical(to_torch(params, network, layout="mae"), state)
    # a decoder with such positions is not MAE's; its encoder can be taken alone
    other = state | {"decoder_pos_embed": state["decoder_pos_embed"] + np.float32(1e-3)}
    with pytest.raises(UserError, match="convert --encoder-only"):
        from_torch(other, heads=4)
    encoder, described = from_torch(other, heads=4, encoder_only=True)
    assert (described.kind, list(encoder)) == ("encoder", ["encoder"])
    jax.tree.map(np.testing.assert_array_equal, encoder["encoder"], params["encoder"])
    # an MLP of another width
    narrow = {k: x[: len(x) // 2] if ".fc1." in k else x for k, x in state.items()}
    narrow |= {k: x[:, : x.shape[1] // 2] for k, x in state.items() if k.endswith("fc2.weight")}
    with pytest.raises(UserError, match="MLP must be 4 times as wide"):
        from_torch(narrow, heads=4, decoder_heads=2)
    # the encoder alone, as released: timm's names
    alone = to_torch(params, network, layout="timm")
    assert sorted(alone) == sorted(k for k in state if "decoder" not in k and k != "mask_token")


def test_the_official_beit():
    """Queries and values have biases, keys have none; the relative index is a buffer."""
    module = hugging_face("beit_shared")
    params, network = from_torch(module.state_dict())
    state = to_torch(params, network, layout="beit")
    index = state["rel_pos_bias.relative_position_index"]
    assert (index.dtype, index.shape, index[0, 0], index[0, 1], index[1, 0]) == (
        *(np.int64, (17, 17)),
        *(51, 49, 50),
    )
    assert "blocks.0.attn.qkv.bias" not in state
    again, _ = from_torch({"module": state})
    jax.tree.map(np.testing.assert_array_equal, again, params)
    _, far = check.differences(params, network, "beit")  # with an independent relative index
    assert far["logits"] < check.TOLERANCE


def test_segmentation_encoder(tmp_path, capsys):
    """The official BEiT's and Hugging Face's: neck and heads are left out, features are equal."""
    settings = SHAPE | dict(num_hidden_layers=4, use_relative_position_bias=True, num_labels=3)
    settings |= dict(out_indices=[1, 2, 3, 4], pool_scales=[1, 2], auxiliary_channels=8)
    module = transformers.BeitForSemanticSegmentation(transformers.BeitConfig(**settings))
    state = written(randomize(module), tmp_path / "hf")
    params, network = from_torch(state)
    assert (network.layout, network.kind) == ("hf_beit", "encoder")
    beside = {key for key in state if not key.startswith("beit.")}
    assert {"fpn1.1.running_var", "fpn2.0.bias", "decode_head.classifier.bias"} < beside
    assert set(network.left_out) == beside
    again, _ = from_torch(module.state_dict())  # transformers 5 has other names for the neck
    jax.tree.map(np.testing.assert_array_equal, again, params)
    alone = {key.removeprefix("beit."): x for key, x in state.items() if key not in beside}
    assert_identical(to_torch(params, network, layout="hf"), alone)

    batch = check.example(network)
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = module.double()(images, output_hidden_states=True).hidden_states
    with jax.enable_x64(True):
        encoder = network.encoder.clone(dtype="float64")
        inner = {"params": exact(params)["encoder"]}
        ours = encoder.apply(inner, batch["image"], layers=(0, 1, 2, 3))
        assert_same_numbers(dict(enumerate(ours)), dict(enumerate(x.numpy() for x in states[1:])))

    official = to_torch(params, network, layout="beit")
    assert sum(key.endswith("relative_position_index") for key in official) == 4
    whole = {f"backbone.{key}": x for key, x in official.items()}
    whole |= {f"backbone.{key}" if "fpn" in key else key: state[key] for key in beside}
    again, network = from_torch({"meta": {"epoch": 1}, "state_dict": whole})
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert network.layout == "beit_finetuned"
    assert len(network.left_out) == len(beside) + 4
    whole = {key: torch.tensor(x) for key, x in whole.items()}
    torch.save({"state_dict": whole}, tmp_path / "a.pth")
    for source, destination, to in (
        ("a.pth", "run", "mim_jax"),
        ("run", "alone", "hf"),
        ("alone", "b.pth", "beit"),
        ("b.pth", "c.pth", "timm"),
    ):
        arguments = [f"{tmp_path}/{source}", f"{tmp_path}/{destination}", f"--to={to}", "--check"]
        assert convert.main(arguments) == 0
        assert "no final norm" in capsys.readouterr().out
    assert_identical(read(tmp_path / "b.pth")[0], official)


def test_a_linear_probe():
    """MAE's linear probe has BatchNorm before its head."""
    rng = np.random.default_rng(0)
    encoder = {k: x for k, x in official_mae().items() if "decoder" not in k and k != "mask_token"}
    probe = {
        "head.0.running_mean": rng.normal(size=32).astype(np.float32),
        "head.0.running_var": rng.uniform(0.5, 2, size=32).astype(np.float32),
        "head.1.weight": rng.normal(size=(3, 32)).astype(np.float32),
        "head.1.bias": rng.normal(size=3).astype(np.float32),
    }
    count = {"head.0.num_batches_tracked": np.array(7)}
    params, network = from_torch(encoder | probe | count, heads=4)
    assert (network.layout, network.kind) == ("mae_linear", "classify")
    assert_identical(to_torch(params, network, layout="mae"), encoder | probe)
    for layout in ("mae", "timm", "hf"):  # in the last two folded into the head
        _, far = check.differences(params, network, layout)
        assert far["logits"] < check.TOLERANCE


def moco_positions(side, width):
    """MoCo v3's positions: its grid has indexing="ij", so rows come before columns."""
    omega = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    w, h = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    w, h = (torch.outer(axis.flatten(), omega) for axis in (w, h))
    table = torch.cat([w.sin(), w.cos(), h.sin(), h.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]


@pytest.mark.parametrize(("code", "width", "heads"), [("dino", 384, 6), ("moco", 384, 12)])
def test_dino_and_moco(code, width, heads, tmp_path):
    """Checkpoints of vit_small as their training code writes them."""
    settings = TIMM | dict(embed_dim=width, num_heads=heads, depth=1, num_classes=0)
    module = randomize(timm_models().vision_transformer.VisionTransformer(**settings))
    if code == "moco":
        module.pos_embed.data = moco_positions(4, width)
    state, other = module.state_dict(), {k: x + 1 for k, x in module.state_dict().items()}
    projector = {"0.weight": torch.ones(8, width), "1.running_mean": torch.ones(8)}

    def named(prefix, arrays):
        return {f"{prefix}{k}": x for k, x in arrays.items()}

    if code == "dino":
        head = named("head.mlp.", projector) | {"head.last_layer.weight_g": torch.ones(8, 1)}
        student = named("module.", named("backbone.", other) | head)
        whole = dict(student=student, teacher=named("backbone.", state) | head, epoch=1)
        whole |= dict(
            args=argparse.Namespace(arch="vit_small"), dino_loss={"center": torch.ones(8)}
        )
        files = [state, named("module.backbone.", state)]
    else:
        query = named("module.base_encoder.", state | named("head.", projector))
        query |= named("module.momentum_encoder.", other | named("head.", projector))
        query |= named("module.predictor.", projector)
        whole, files = dict(epoch=1, arch="vit_small", state_dict=query), [named("module.", state)]
    whole["optimizer"] = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    for number, content in enumerate([whole, *files]):
        torch.save(content, tmp_path / "a.pth")
        params, network, _ = load_weights(tmp_path / "a.pth")
        assert (network.kind, network.encoder.heads, bool(network.left_out)) == (
            *("encoder", heads),
            number == 0,
        )
        assert_identical(
            to_torch(params, network, layout="timm"), {k: x.numpy() for k, x in state.items()}
        )
    batch = check.example(network)
    with torch.no_grad():
        images = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
        tokens = module.double().forward_features(images).numpy()
    assert_same_numbers(check.run(exact(params), network, batch), dict(tokens=tokens))


def test_wrong_arrays_are_listed():
    state = official_mae()
    del state["blocks.1.mlp.fc1.bias"], state["decoder_norm.weight"]
    state["blocks.0.attn.qkv.bias"] = np.zeros(90)
    state["head_dist.weight"] = np.zeros((3, 32))
    with pytest.raises(UserError) as error:
        from_torch(state)
    assert str(error.value) == (
        "this is not the official MAE: 2 missing: decoder_norm.weight, "
        "blocks.1.mlp.fc1.bias; 1 unexpected: head_dist.weight; 1 of another shape: "
        "blocks.0.attn.qkv.bias (90,), must be (96,)."
    )
    resnet = {"conv1.weight": np.zeros((64, 3, 7, 7)), "bn1.running_mean": np.zeros(64)}
    with pytest.raises(
        UserError, match=r"no supported layout has arrays of these names: conv1\.weight, bn1"
    ):
        from_torch(resnet)
    state = {k: x for k, x in official_mae().items() if "decoder" not in k and "norm." not in k}
    del state["mask_token"]
    from_torch(state)  # an encoder may end with a block, as in a segmentation
    state |= {"head.weight": np.zeros((3, 32)), "head.bias": np.zeros(3)}
    with pytest.raises(UserError, match=r"decoder: 2 missing: norm\.bias, norm\.weight\."):
        from_torch(state)
    state = official_mae() | {"patch_embed.proj.weight": np.zeros((32, 192))}
    with pytest.raises(UserError, match=r"patch_embed.proj.weight has the shape \(32, 192\)"):
        from_torch(state)


@pytest.mark.parametrize(
    ("name", "layout", "sentence"),
    [
        ("beit_shared", "mae", "use --to=beit"),
        ("mae", "beit", "BEiT has no key bias: use --to=mae"),
        ("mae", "tensorflow", "there is no layout 'tensorflow'; choose one of mae, beit, timm, hf"),
    ],
)
def test_layouts_that_do_not_support_a_network(name, layout, sentence):
    params, network = from_torch(hugging_face(name).state_dict(), heads=4, decoder_heads=2)
    with pytest.raises(UserError, match=sentence):
        to_torch(params, network, layout=layout)


def test_hugging_face_vit_does_not_pool_by_the_mean():
    encoder = {k: x for k, x in official_mae().items() if "decoder" not in k and k != "mask_token"}
    fine_tuned = {re.sub(r"^norm\.", "fc_norm.", name): x for name, x in encoder.items()}
    fine_tuned |= {"head.weight": np.ones((3, 32), np.float32), "head.bias": np.ones(3, np.float32)}
    params, network = from_torch(fine_tuned, heads=4)
    assert_identical(to_torch(params, network, layout="mae"), fine_tuned)
    with pytest.raises(UserError, match=r"the mean of the patches: use --to=timm or --to=mae\."):
        to_torch(params, network, layout="hf")


def run_of_ours(folder):
    """Converts the MAE above to a run with the command."""
    torch.save({"model": {k: torch.tensor(x) for k, x in official_mae().items()}}, folder / "a.pth")
    arguments = ["--heads=4", "--decoder-heads=2"]
    assert convert.main([f"{folder}/a.pth", f"{folder}/run", "--to=mim_jax", *arguments]) == 0
    return f"{folder}/run"


def test_the_command_there_and_back(tmp_path, capsys):
    run, state = run_of_ours(tmp_path), official_mae()
    output = capsys.readouterr().out
    assert "the official MAE, mae: width 32, 2 blocks, 4 heads" in output
    assert f"to start from it: --config.init_from.encoder={run}\n" in output
    params, network = from_torch(state, heads=4, decoder_heads=2)
    # init_from takes it
    zeros = jax.tree.map(np.zeros_like, params)
    begun = start_from(
        TrainState(0, jax.tree.map(jax.numpy.array, zeros), {}, ()), "encoder", run, {}
    )
    jax.tree.map(np.testing.assert_array_equal, begun.params["encoder"], params["encoder"])
    # back, in each kind of file
    assert convert.main([run, f"{tmp_path}/hf", "--to=hf", "--check"]) == 0
    alone = [f"{tmp_path}/hf", f"{tmp_path}/alone", "--to=mim_jax", "--encoder-only", "--check"]
    assert convert.main(alone) == 0
    output = capsys.readouterr().out
    assert f"transformers {transformers.__version__}, ViTMAEForPreTraining" in output
    for source, file in ((run, "b.pth"), (f"{tmp_path}/hf", "b.safetensors")):
        assert convert.main([source, f"{tmp_path}/{file}", "--to=mae", "--check"]) == 0
        assert_identical(read(tmp_path / file)[0], state)
    _, same = from_torch(read(tmp_path / "b.pth")[0], heads=4, decoder_heads=2)
    assert same == network
    # PyTorch's own readers
    loaded = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert_identical({k: x.numpy() for k, x in loaded.items()}, state)
    model, info = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    assert (model.config.layer_norm_eps, model.config.decoder_num_attention_heads) == (1e-6, 2)
    batch = check.example(network)
    far = theirs(model, {k: x.astype(np.float32) for k, x in batch.items()})
    ours = check.run(exact(params), network, batch)
    for name, x in far.items():
        np.testing.assert_allclose(ours[name], x, atol=1e-5 * np.abs(x).max(), rtol=0)
    assert inspect([run]) == 0
    output = capsys.readouterr().out
    assert "encoder: " in output
    assert "block_1/qkv/kernel" in output
    assert "step: 0" in output


@pytest.mark.parametrize("error", [1e-6, np.nan])
def test_a_check_that_fails(error, tmp_path, monkeypatch, capsys):
    run, to_torch = run_of_ours(tmp_path), check.to_torch

    def wrong(params, network, layout):
        state = to_torch(params, network, layout=layout)
        return state | {"blocks.1.norm2.bias": state["blocks.1.norm2.bias"] + error}

    monkeypatch.setattr(check, "to_torch", wrong)
    assert convert.main([run, f"{tmp_path}/b.pth", "--to=mae", "--check"]) == 1
    assert "failed: more than 1e-08" in capsys.readouterr().err


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_errors_are_one_sentence(tmp_path, capsys):
    made, run = tmp_path / "made", run_of_ours(tmp_path)
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil(made)}, 2))
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "resnet.pth")
    (tmp_path / "empty").mkdir()
    for source, destination, to, sentence in (
        ("evil.pth", "b.pth", "mae", "evil.pth is refused, and no code in it was executed"),
        ("short.pth", "b.pth", "mae", "damaged or truncated"),
        ("resnet.pth", "b.pth", "mae", "no supported layout has arrays of these names"),
        ("nothing.pth", "b.pth", "mae", "nothing.pth: No such file"),
        ("empty", "b.pth", "mae", "is neither a run with checkpoints"),
        ("run", "b.txt", "mae", "must end with .safetensors or .pth"),
        ("run", "no/where/b.pth", "mae", "there is no folder"),
        ("run", "run", "mim_jax", "already holds checkpoints"),
        ("run", "run", "hf", "is a run directory: choose another folder"),
        ("run", "b.npz", "mim_jax", "--to=mim_jax writes a folder"),
        ("run", "b.pth", "beit", "use --to=mae or --to=timm"),
        ("a.pth", "hf", "hf", "set --heads=N"),
    ):
        capsys.readouterr()
        code = convert.main([f"{tmp_path}/{source}", f"{tmp_path}/{destination}", f"--to={to}"])
        error = capsys.readouterr().err
        assert (code, sentence in error, error.count("\n")) == (2, True, 1), error
    assert not made.exists()
    assert os.path.isdir(run)
    with pytest.raises(SystemExit):
        convert.main([run, f"{tmp_path}/b.pth", "--to=mae", "--image-size=0"])
    assert "--image-size: 0 must be at least 1" in capsys.readouterr().err


def test_the_licence_of_released_weights(tmp_path, capsys):
    state = {k: torch.tensor(x) for k, x in official_mae().items()}
    torch.save({"model": state}, tmp_path / "mae_pretrain_vit_base.pth")
    assert inspect([f"{tmp_path}/mae_pretrain_vit_base.pth"]) == 0
    assert "CC-BY-NC-4.0" in capsys.readouterr().out


def test_images_of_another_size(tmp_path, capsys):
    """Positions are interpolated as in timm, and MAE's fixed ones as in its fine-tuning."""
    run_of_ours(tmp_path)
    arguments = [f"{tmp_path}/a.pth", "--heads=4", "--decoder-heads=2", "--image-size=48"]
    assert convert.main([*arguments, f"{tmp_path}/b.pth", "--to=timm"]) == 2
    assert "set --encoder-only" in capsys.readouterr().err
    arguments += ["--encoder-only", "--check"]
    assert convert.main([*arguments, f"{tmp_path}/b.pth", "--to=timm"]) == 0
    larger = read(tmp_path / "b.pth")[0]["pos_embed"]
    before = torch.tensor(official_mae()["pos_embed"])
    image = before[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    after = torch.nn.functional.interpolate(image, (6, 6), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(larger[:, 1:], after.flatten(2).transpose(1, 2), atol=1e-6)
    assert convert.main([f"{tmp_path}/b.pth", f"{tmp_path}/hf", "--to=hf", "--check"]) == 0
    assert "ViTModel" in capsys.readouterr().out
    # BEiT's relative positions
    save = dict(model=hugging_face("beit_mean").state_dict())
    torch.save(save, tmp_path / "beit.pth")
    arguments = [
        f"{tmp_path}/beit.pth",
        f"{tmp_path}/beit",
        "--to=hf",
        "--image-size=48",
        "--check",
    ]
    assert convert.main(arguments) == 0
    table = "beit.encoder.layer.0.attention.attention.relative_position_bias."
    table = read(tmp_path / "beit" / "model.safetensors")[0][f"{table}relative_position_bias_table"]
    assert table.shape == (11 * 11 + 3, 4)


def test_a_run_starts_from_a_hybrid(tmp_path, capsys):
    """A file of timm becomes a run for init_from.encoder; no other library has its stem."""
    kind, settings = TIMMS["hybrid"]
    module = attrgetter(kind)(timm_models())(**TIMM | settings | dict(img_size=32))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    assert convert.main([f"{tmp_path}/a.pth", f"{tmp_path}/run", "--to=mim_jax", "--heads=4"]) == 0
    assert "4 heads, patches of 16 x 16 from a resnet50" in capsys.readouterr().out

    model = schema.load("configs/vit_hybrid_base.py").model.to_dict()
    network = vit(**model | dict(width=32, depth=1, heads=4, dtype="float32"))
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))["params"]
    encoder = jax.tree.map(lambda x: jax.numpy.zeros(x.shape), shapes)
    begun = start_from(
        TrainState(0, {"encoder": encoder}, {}, ()), "encoder", f"{tmp_path}/run", {}
    )
    params, _ = from_torch(module.state_dict(), heads=4)
    jax.tree.map(np.testing.assert_array_equal, begun.params["encoder"], params["encoder"])

    assert convert.main([f"{tmp_path}/run", f"{tmp_path}/b.pth", "--to=timm"]) == 0
    assert_identical(read(tmp_path / "b.pth")[0], read(tmp_path / "a.pth")[0])
    for to in ("mae", "beit", "hf"):
        assert convert.main([f"{tmp_path}/run", f"{tmp_path}/c.pth", f"--to={to}"]) == 2
        assert "only timm's ViT has a ResNet stem: use --to=timm" in capsys.readouterr().err


def test_images_that_are_not_square(tmp_path, capsys):
    """Only the user knows their size; Hugging Face has no such models."""
    module = timm_models().vision_transformer.VisionTransformer
    module = randomize(module(**TIMM | dict(img_size=(24, 48))))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    arguments = [f"{tmp_path}/a.pth", "--heads=4", "--check"]
    assert convert.main([*arguments, f"{tmp_path}/b.pth", "--to=timm"]) == 2
    assert "set --image-size=HEIGHT,WIDTH" in capsys.readouterr().err
    arguments.append("--image-size=24,48")
    assert convert.main([*arguments, f"{tmp_path}/b.pth", "--to=timm"]) == 0
    assert_identical(read(tmp_path / "a.pth")[0], read(tmp_path / "b.pth")[0])
    assert convert.main([*arguments, f"{tmp_path}/run", "--to=mim_jax"]) == 0
    assert convert.main([f"{tmp_path}/run", f"{tmp_path}/hf", "--to=hf"]) == 2
    assert "images are square: use --to=timm" in capsys.readouterr().err


def test_dalle_as_a_tokenizer(tmp_path, capsys):
    """A folder with its two files becomes a run for init_from.tokenizer."""
    rng, shapes = np.random.default_rng(0), {}
    model = dvae(vocabulary=11, width=8, layers=2, blocks=1, codebook=5)
    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    for part, file in (("tokenizer", "encoder"), ("decoder", "decoder")):
        state = to_torch({part: params[part]}, layout="dalle")
        shapes[file] = {k: torch.tensor(x) for k, x in state.items()}
        torch.save(shapes[file], tmp_path / f"{file}.pkl")
    assert convert.main([str(tmp_path), f"{tmp_path}/run", "--to=mim_jax"]) == 0
    zeros = jax.tree.map(jax.numpy.zeros_like, params)
    state = start_from(TrainState(0, {}, zeros, ()), "tokenizer", f"{tmp_path}/run", {})
    jax.tree.map(np.testing.assert_array_equal, state.buffers, params)
    capsys.readouterr()
    assert inspect([f"{tmp_path}/run"]) == 0
    assert "dalle dVAE, 11 tokens" in capsys.readouterr().out


# --- Segmentation. ---

SEGMENTS = dict(num_labels=5, auxiliary_channels=8, use_relative_position_bias=True)


@functools.cache
def segmenter(name: str):
    """Returns a segmentation model of transformers with random weights and running statistics."""
    shape = SHAPE | dict(image_size=64, patch_size=16)
    if name == "BeitForSemanticSegmentation":
        settings = dict(num_hidden_layers=6, out_indices=[3, 4, 5, 6])
        module = getattr(transformers, name)(transformers.BeitConfig(**shape | SEGMENTS | settings))
    else:
        settings = dict(num_hidden_layers=4, out_indices=[1, 2, 3, 4], add_fpn=True)
        backbone = transformers.BeitConfig(**shape | SEGMENTS | settings)
        settings = dict(hidden_size=16, num_labels=5, auxiliary_in_channels=32)
        config = transformers.UperNetConfig(
            backbone_config=backbone, auxiliary_channels=8, **settings
        )
        module = getattr(transformers, name)(config)
    module = randomize(module)
    for key, x in module.named_buffers():
        if key.endswith("running_var"):
            x.copy_(torch.linspace(0.5, 1.5, len(x)))
        elif key.endswith("running_mean"):
            x.copy_(torch.linspace(-0.3, 0.3, len(x)))
    return module


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("BeitForSemanticSegmentation", (1, 2, 3, 4)),  # index i is the state before block i - 1
        ("UperNetForSemanticSegmentation", (0, 1, 2, 3)),
    ],
)
def test_segmentation_of_transformers(name, layers, tmp_path):
    """Read, run, written and read again: the same outputs and arrays."""
    module = segmenter(name)
    params, network = from_torch(module.state_dict(), heads=4, metadata=dict(layers=layers))
    module.save_pretrained(tmp_path / "theirs")
    read_params, read_network, _ = load_weights(tmp_path / "theirs")
    assert read_network.metadata["layers"] == layers
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read_params))
    batch = check.example(network)
    ours = check.run(exact(params), read_network, batch)
    images = torch.tensor(batch["image"], dtype=torch.float64).permute(0, 3, 1, 2)
    twin = copy.deepcopy(module).double()
    with torch.no_grad():
        logits = twin(images).logits
        if logits.shape[2:] != images.shape[2:]:
            logits = torch.nn.functional.interpolate(logits, images.shape[2:], mode="bilinear")
    assert_same_numbers(ours, dict(logits=logits.permute(0, 2, 3, 1).numpy()))
    title, largest = check.differences(params, read_network, "hf")
    assert name in title
    assert set(largest) == {"logits", "auxiliary"}
    assert max(largest.values()) < 1e-8
    state = to_torch(params, read_network, layout="hf")
    assert state.keys() == written(module, tmp_path / "theirs").keys()


@pytest.mark.parametrize("name", ["BeitForSemanticSegmentation", "UperNetForSemanticSegmentation"])
def test_pictures_of_segmentations_of_transformers(name, tmp_path):
    """From a folder and after conversion, the classes that transformers finds likeliest."""
    module = segmenter(name)
    module.save_pretrained(tmp_path / "theirs")
    transformers.BeitImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, size=dict(height=64, width=64)
    ).save_pretrained(tmp_path / "theirs")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    drawn = pictures.segment(tmp_path / "theirs", [image])["its classes"][0]
    pixels = (image / 255 - 0.5) / 0.5
    with torch.no_grad():
        batch = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
        logits = torch.nn.functional.interpolate(module(batch).logits, (64, 64), mode="bilinear")
    expected = np.array(palette(5))[logits[0].argmax(0).numpy()]
    assert np.mean(expected == (drawn[:64, :64] * 255).round()) > 0.99
    weights = load_weights(tmp_path / "theirs")[:2]
    save_weights(tmp_path / "run", *weights, "mim_jax")
    again = pictures.segment(tmp_path / "run", [image])["its classes"][0]
    np.testing.assert_array_equal(again, drawn)


def segmentation_run(**settings):
    """Returns parameters and network of a run."""
    encoder = vit(
        width=32, depth=4, heads=4, patch=16, positions="learned", **settings.pop("vit", {})
    )
    names, colors = tuple("abcde"), ((0, 0, 0),) * 5
    settings = dict(channels=16, auxiliary_channels=8, batch_norm=2) | settings
    ours = segment.objective(encoder, names, colors, (64, 64), **settings)
    batch = {"image": np.zeros((2, 64, 64, 3), np.uint8)}
    params, buffers = jax.jit(ours.init)(jax.random.key(0), batch)
    key = jax.random.key(1)
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), params)
    params |= buffers
    metadata = dict(layers=settings.get("layers") or (0, 1, 2, 3))
    return params, Network(encoder, "segment", grid=(4, 4), metadata=metadata)


def test_a_decoder_on_the_last_block_is_written_as_upernet():
    """With a key bias, which changes no output, and relative positions, as MAE's recipe."""
    params, network = segmentation_run(vit=dict(relative_bias="own"))
    title, largest = check.differences(params, network, "hf")
    assert "UperNetForSemanticSegmentation" in title
    assert max(largest.values()) < 1e-8
    bias = params["encoder"]["block_0"]["qkv"]["bias"]
    assert np.abs(np.split(np.asarray(bias), 3)[1]).max() > 0.01


def test_segmentation_without_auxiliary_decoder():
    params, network = segmentation_run(auxiliary_weight=0.0, vit=dict(key_bias=False))
    _, largest = check.differences(params, network, "hf")
    assert set(largest) == {"logits"}
    assert max(largest.values()) < 1e-8


@pytest.mark.parametrize(
    ("settings", "to", "words"),
    [
        (dict(decoder="setr_pup"), "hf", "BEiT with UPerNet only"),
        (dict(decoder="linear"), "hf", "BEiT with UPerNet only"),
        (dict(layers=(0, 0, 1, 3)), "hf", "out_indices must increase"),
        ({}, "beit", "no decoder for segmentation"),
    ],
)
def test_segmentation_refused(settings, to, words):
    params, network = segmentation_run(**settings)
    with pytest.raises(UserError, match=words):
        to_torch(params, network, layout=to)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(pool_scales=[1, 2, 4, 8]), r"pool_scales = \[1, 2, 4, 8\] must be \[1, 2, 3, 6\]"),
        (dict(out_indices=[1, 3, 4, 5]), "select the patch embeddings"),
    ],
)
def test_an_incompatible_decoder_is_refused(change, words, tmp_path):
    segmenter("BeitForSemanticSegmentation").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        load_weights(tmp_path)
