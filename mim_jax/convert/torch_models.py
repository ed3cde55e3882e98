"""The PyTorch models that converted weights are for: transformers', timm's, and plain torch.

Shapes: b images, n patches, k visible, d width, h heads, v values, c channels.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from mim_jax import UserError
from mim_jax.convert.hugging_face import write
from mim_jax.convert.network import Network, extra


def outputs(
    state: dict[str, np.ndarray], network: Network, layout: str, batch: dict[str, np.ndarray]
) -> tuple[str, dict[str, np.ndarray]]:
    """-> what was run, and what it gives in float64, by name.

    batch: `image` (b, H, W, c), `masked` (b, n), and for MAE `noise` (b, n), by which it hides
    three quarters. Transformers runs its own layouts, timm its own if it is there; the others'
    code runs on no current PyTorch, so that they are computed here.
    """
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        if layout.startswith("hf_"):
            found = of_transformers(state, network, layout, images, batch)
        else:
            model = (
                of_timm(state, network, images.shape[2:]) if layout.startswith("timm_") else None
            )
            tensors = {name: torch.tensor(x) for name, x in state.items()}
            found = (
                model(images) if model else ("plain torch", plain(tensors, network, images, batch))
            )
    return found[0], {name: x.numpy() for name, x in found[1].items()}


def of_transformers(state, network, layout, images, batch):
    """Hugging Face's, as from_pretrained makes it of the folder that we write."""
    with extra():
        import transformers
    with tempfile.TemporaryDirectory() as folder:
        config = write(Path(folder), state, network, layout)
        [name] = config["architectures"]
        transformers.utils.logging.disable_progress_bar()
        options = dict(dtype=torch.float64, output_loading_info=True)
        unpooled = name == "BeitModel" and "pooler.layernorm.weight" not in state
        options |= dict(add_pooling_layer=False) if name == "ViTModel" or unpooled else {}
        with contextlib.redirect_stderr(io.StringIO()):
            model, info = getattr(transformers, name).from_pretrained(folder, **options)
    wrong = [key for kind in info.values() for key in kind]
    if wrong:
        raise UserError(f"transformers does not take the arrays {wrong[:6]}.")
    model.eval()
    title = f"transformers {transformers.__version__}, {name}"
    if name == "ViTMAEForPreTraining":
        noise = torch.tensor(batch["noise"])
        latent = model.vit(images, noise=noise).last_hidden_state
        return title, dict(latent=latent, predictions=model(images, noise=noise).logits)
    if name == "BeitForMaskedImageModeling":
        return title, dict(logits=model(images, torch.tensor(batch["masked"])).logits)
    found = model(images)
    if "ForImageClassification" in name:
        return title, dict(logits=found.logits)
    return title, dict(tokens=found.last_hidden_state)


def of_timm(state, network, size):
    """images -> what timm's model gives of them; None where timm cannot be imported."""
    try:
        import timm
        from timm.models.beit import Beit
        from timm.models.vision_transformer import VisionTransformer
        from timm.models.vision_transformer_hybrid import vit_base_r50_s16_224 as hybrid
    except (ImportError, RuntimeError):  # it needs a torchvision that fits torch
        return None
    encoder = network.encoder
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    options = dict(
        img_size=size,
        patch_size=encoder.patch,
        in_chans=network.channels,
        num_classes=classes,
        embed_dim=encoder.width,
        depth=encoder.depth,
        num_heads=encoder.heads,
        init_values=encoder.layer_scale or None,
        global_pool="avg" if "fc_norm.weight" in state else "token",
    )
    if "blocks.0.attn.q_bias" in state:
        module = Beit(
            **options,
            use_abs_pos_emb="pos_embed" in state,
            use_rel_pos_bias=encoder.relative_bias == "own",
            use_shared_rel_pos_bias=encoder.relative_bias == "shared",
        )
    elif encoder.stem != "none":
        module = hybrid(**options | dict(patch_size=1))  # of features
    else:
        module = VisionTransformer(**options)
    if options["global_pool"] == "token" and "norm.weight" not in state:
        module.norm = torch.nn.Identity()  # of an encoder that a segmentation was trained with
    module = module.double().eval()
    loaded = module.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    missing = [key for key in loaded.missing_keys if "relative_position_index" not in key]
    if missing or loaded.unexpected_keys:
        raise UserError(f"timm misses {missing} and does not know {loaded.unexpected_keys}.")

    def forward(images):
        found = dict(logits=module(images)) if classes else {}
        return f"timm {timm.__version__}", found | dict(tokens=module.forward_features(images))

    return forward


def plain(state, network, images, batch):
    """What the papers say, in the official names: MAE's and BEiT's, and timm's of a hybrid."""
    grid = [side // p for side, p in zip(images.shape[2:], network.encoder.patch, strict=True)]
    x = images if network.encoder.stem == "none" else stem(state, images)
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = F.conv2d(x, kernel, bias, stride=kernel.shape[2:])
    x = x.flatten(2).transpose(1, 2)  # (b, n, d)
    if "lm_head.weight" in state:
        masked = torch.tensor(batch["masked"])[..., None]
        x = torch.where(masked, state["mask_token"], x)
    cls, positions = state["cls_token"], state.get("pos_embed")
    if positions is not None:
        x, cls = x + positions[:, 1:], cls + positions[:, :1]
    hides = "decoder_embed.weight" in state
    if hides:
        order = torch.argsort(torch.tensor(batch["noise"]), stable=True)
        visible = order[:, : int(order.shape[1] * 0.25), None]
        x = torch.take_along_dim(x, visible, 1)
    x = torch.cat([cls.expand(len(x), -1, -1), x], 1)
    x = blocks(state, "blocks", x, network.encoder.heads, grid)
    found = {}
    if "norm.weight" in state:
        x = norm(state, "norm", x)
    if hides:
        return dict(latent=x, predictions=decode(state, x, order, network.decoder.heads))
    if "lm_head.weight" in state:
        return dict(logits=F.linear(x[:, 1:], state["lm_head.weight"], state["lm_head.bias"]))
    mean = "fc_norm.weight" in state
    pooled = norm(state, "fc_norm", x[:, 1:].mean(1)) if mean else x[:, 0]
    if "head.0.running_mean" in state:
        pooled = (pooled - state["head.0.running_mean"]) / (
            state["head.0.running_var"] + 1e-6
        ).sqrt()
        found["logits"] = F.linear(pooled, state["head.1.weight"], state["head.1.bias"])
    elif "head.weight" in state:
        found["logits"] = F.linear(pooled, state["head.weight"], state["head.bias"])
    return found | dict(tokens=x)


def stem(state, x):
    """images (b, c, H, W) -> features (b, 1024, H/16, W/16) of timm's ResNet-50 of three stages."""
    state = {key.removeprefix("patch_embed.backbone."): value for key, value in state.items()}

    def same(x, side, stride):
        """As TensorFlow pads: to ceil(n / stride) windows, an odd zero at the end."""
        down, right = (max((-(-n // stride) - 1) * stride + side - n, 0) for n in x.shape[2:])
        return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))

    def conv(x, name, stride=1):
        """A convolution with standardised kernels, and its group norm."""
        kernel = state[f"{name.replace('*', 'conv')}.weight"]
        variance, mean = torch.var_mean(kernel, (1, 2, 3), correction=0, keepdim=True)
        kernel = (kernel - mean) * (variance + 1e-8).rsqrt()
        x = F.conv2d(same(x, kernel.shape[-1], stride), kernel, stride=stride)
        norm = name.replace("*", "norm")
        return F.group_norm(x, 32, state[f"{norm}.weight"], state[f"{norm}.bias"])

    x = F.max_pool2d(same(conv(x, "stem.*", 2).relu(), 3, 2), 3, 2)  # zeros lose, or draw
    for stage, blocks in enumerate((3, 4, 9)):
        for i in range(blocks):
            name, stride = f"stages.{stage}.blocks.{i}", 2 if stage and i == 0 else 1
            y = conv(conv(x, f"{name}.*1").relu(), f"{name}.*2", stride).relu()
            shortcut = x if i else conv(x, f"{name}.downsample.*", stride)
            x = (conv(y, f"{name}.*3") + shortcut).relu()
    return x


def decode(state, latent, order, heads):
    """MAE's decoder: latent (b, 1 + k, d) -> all patches in the order of the image (b, n, v)."""
    x = F.linear(latent, state["decoder_embed.weight"], state["decoder_embed.bias"])
    hidden = state["mask_token"].expand(len(x), order.shape[1] + 1 - x.shape[1], -1)
    patches = torch.cat([x[:, 1:], hidden], 1)
    patches = torch.take_along_dim(patches, torch.argsort(order)[..., None], 1)
    x = torch.cat([x[:, :1], patches], 1) + state["decoder_pos_embed"]
    x = norm(state, "decoder_norm", blocks(state, "decoder_blocks", x, heads, None))
    return F.linear(x, state["decoder_pred.weight"], state["decoder_pred.bias"])[:, 1:]


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def blocks(state, name, x, heads, grid):
    """Pre-norm blocks, with what of BEiT the state has."""
    shared = state.get("rel_pos_bias.relative_position_bias_table")
    i = 0
    while f"{name}.{i}.norm1.weight" in state:
        block = {
            key.removeprefix(f"{name}.{i}."): value
            for key, value in state.items()
            if key.startswith(f"{name}.{i}.")
        }
        table = block.get("attn.relative_position_bias_table", shared)
        bias = None if table is None else relative(table, *grid)
        y = attention(block, norm(block, "norm1", x), heads, bias)
        x = x + y * block.get("gamma_1", block.get("ls1.gamma", 1))
        y = F.linear(norm(block, "norm2", x), block["mlp.fc1.weight"], block["mlp.fc1.bias"])
        y = F.linear(F.gelu(y), block["mlp.fc2.weight"], block["mlp.fc2.bias"])
        x = x + y * block.get("gamma_2", block.get("ls2.gamma", 1))
        i += 1
    return x


def attention(block, x, heads, bias):
    """x (b, n, d), bias (h, n, n) -> (b, n, d)."""
    b, n, d = x.shape
    qkv_bias = block.get("attn.qkv.bias")
    if "attn.q_bias" in block:  # keys have none
        q_bias, v_bias = block["attn.q_bias"], block["attn.v_bias"]
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    qkv = F.linear(x, block["attn.qkv.weight"], qkv_bias)
    q, k, v = qkv.reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) / (d // heads) ** 0.5
    weights = (logits if bias is None else logits + bias).softmax(-1)
    y = (weights @ v).transpose(1, 2).reshape(b, n, d)
    return F.linear(y, block["attn.proj.weight"], block["attn.proj.bias"])


def relative(table, rows, columns):
    """table ((2 rows - 1)(2 columns - 1) + 3, h) -> (h, 1 + n, 1 + n), by query and key."""
    n = rows * columns
    index = torch.empty(1 + n, 1 + n, dtype=torch.long)
    for query in range(n):
        for key in range(n):
            down = query // columns - key // columns + rows - 1
            right = query % columns - key % columns + columns - 1
            index[1 + query, 1 + key] = down * (2 * columns - 1) + right
    index[0], index[:, 0], index[0, 0] = len(table) - 3, len(table) - 2, len(table) - 1
    return table[index].permute(2, 0, 1)
