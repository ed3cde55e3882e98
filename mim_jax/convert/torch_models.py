"""Runs converted weights in PyTorch: with transformers, with timm, or in plain torch.

Shapes: b images, n patches, k visible, d width, h heads, v values, c channels.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from mim_jax import UserError
from mim_jax.convert.hugging_face import write
from mim_jax.convert.network import Network, extra


def outputs(
    state: dict[str, np.ndarray], network: Network, layout: str, batch: dict[str, np.ndarray]
) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the name of PyTorch's model, and its outputs in float64 by name.

    Models of transformers, and of timm if it is installed, run in these libraries. The other models
    are written in plain PyTorch, because their official code does not run on current versions.

    Args:
        batch: `image` (b, H, W, c), `masked` (b, n), and `noise` (b, n), by which MAE hides
            patches.
    """
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    tensors = {name: torch.tensor(x) for name, x in state.items()}
    with torch.no_grad():
        if layout.startswith("hf_"):
            title, values = of_transformers(state, network, layout, images, batch)
        elif layout.startswith("timm_") and (model := of_timm(tensors, network, images.shape[2:])):
            title, values = model(images)
        else:
            title, values = "plain torch", plain(tensors, network, images, batch)
    return title, {name: x.numpy() for name, x in values.items()}


def of_transformers(state, network, layout, images, batch):
    """Writes a Hugging Face folder, loads it with from_pretrained, and runs the model."""
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
            model, problems = getattr(transformers, name).from_pretrained(folder, **options)
    wrong = [key for kind in problems.values() for key in kind]
    if wrong:
        raise UserError(f"transformers does not accept the arrays {wrong[:6]}.")
    model.eval()
    title = f"transformers {transformers.__version__}, {name}"
    if name == "ViTMAEForPreTraining":
        noise = torch.tensor(batch["noise"])
        latent = model.vit(images, noise=noise).last_hidden_state
        return title, dict(latent=latent, predictions=model(images, noise=noise).logits)
    if name == "BeitForMaskedImageModeling":
        return title, dict(logits=model(images, torch.tensor(batch["masked"])).logits)
    if "ForSemanticSegmentation" in name:
        return title, segment(model, images)
    if "ForImageClassification" in name:
        return title, dict(logits=model(images).logits)
    return title, dict(tokens=model(images).last_hidden_state)


def segment(model, images):
    """Runs a segmentation model of transformers. Returns logits at the size of the images."""
    outputs, heads = {}, {"logits": model.decode_head, "auxiliary": model.auxiliary_head}

    def keep(name):
        def hook(module, inputs, output):
            outputs[name] = F.interpolate(output, images.shape[2:], mode="bilinear")

        return hook

    for name, head in heads.items():
        if head is not None:
            head.register_forward_hook(keep(name))
    model(images)
    return {name: x.permute(0, 2, 3, 1) for name, x in outputs.items()}


def of_timm(state, network, size):
    """Returns a function that runs timm's model, None if timm cannot be imported."""
    try:
        import timm
        from timm.models.beit import Beit
        from timm.models.vision_transformer import VisionTransformer
        from timm.models.vision_transformer_hybrid import vit_base_r50_s16_224 as hybrid
    except (ImportError, RuntimeError):  # torchvision may not match torch
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
        module = hybrid(**options | dict(patch_size=1))  # patches of features
    else:
        module = VisionTransformer(**options)
    if options["global_pool"] == "token" and "norm.weight" not in state:
        module.norm = torch.nn.Identity()  # an encoder from segmentation
    module = module.double().eval()
    loaded = module.load_state_dict(state, strict=False)
    missing = [key for key in loaded.missing_keys if "relative_position_index" not in key]
    if missing or loaded.unexpected_keys:
        raise UserError(f"timm lacks {missing} and does not expect {loaded.unexpected_keys}.")

    def forward(images):
        logits = dict(logits=module(images)) if classes else {}
        return f"timm {timm.__version__}", logits | dict(tokens=module.forward_features(images))

    return forward


def plain(state, network, images, batch):
    """Runs MAE or BEiT with official names, or a hybrid ViT with timm's, as in their papers."""
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
    outputs = {}
    if "norm.weight" in state:
        x = norm(state, "norm", x)
    if hides:
        return dict(latent=x, predictions=decode(state, x, order, network.decoder.heads))
    if "lm_head.weight" in state:
        return dict(logits=F.linear(x[:, 1:], state["lm_head.weight"], state["lm_head.bias"]))
    pooled = norm(state, "fc_norm", x[:, 1:].mean(1)) if "fc_norm.weight" in state else x[:, 0]
    if "head.0.running_mean" in state:
        mean, variance = state["head.0.running_mean"], state["head.0.running_var"]
        pooled = (pooled - mean) / (variance + 1e-6).sqrt()
        outputs["logits"] = F.linear(pooled, state["head.1.weight"], state["head.1.bias"])
    elif "head.weight" in state:
        outputs["logits"] = F.linear(pooled, state["head.weight"], state["head.bias"])
    return outputs | dict(tokens=x)


def stem(state, x):
    """Maps images (b, c, H, W) to features (b, 1024, H/16, W/16): timm's ResNet-50 stem."""
    state = {key.removeprefix("patch_embed.backbone."): value for key, value in state.items()}

    def same(x, side, stride):
        """Pads as TensorFlow does: ceil(n / stride) windows, an odd zero at the end."""
        down, right = (max((-(-n // stride) - 1) * stride + side - n, 0) for n in x.shape[2:])
        return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))

    def conv(x, name, stride=1):
        """Applies a convolution with standardized kernels, and its group norm."""
        kernel = state[f"{name.replace('*', 'conv')}.weight"]
        variance, mean = torch.var_mean(kernel, (1, 2, 3), correction=0, keepdim=True)
        kernel = (kernel - mean) * (variance + 1e-8).rsqrt()
        x = F.conv2d(same(x, kernel.shape[-1], stride), kernel, stride=stride)
        norm = name.replace("*", "norm")
        return F.group_norm(x, 32, state[f"{norm}.weight"], state[f"{norm}.bias"])

    # After ReLU, padding with zeros has the same effect as padding with -inf.
    x = F.max_pool2d(same(conv(x, "stem.*", 2).relu(), 3, 2), 3, 2)
    for stage, blocks in enumerate((3, 4, 9)):
        for i in range(blocks):
            name, stride = f"stages.{stage}.blocks.{i}", 2 if stage and i == 0 else 1
            y = conv(conv(x, f"{name}.*1").relu(), f"{name}.*2", stride).relu()
            shortcut = x if i else conv(x, f"{name}.downsample.*", stride)
            x = (conv(y, f"{name}.*3") + shortcut).relu()
    return x


def decode(state, latent, order, heads):
    """Maps latent (b, 1 + k, d) to predictions (b, n, v) in the order of the image."""
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
    """Runs pre-norm blocks, with BEiT's relative positions and gains if the state has them."""
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
    """Maps x (b, n, d) to (b, n, d); bias (h, n, n) is added to the logits."""
    b, n, d = x.shape
    qkv_bias = block.get("attn.qkv.bias")
    if "attn.q_bias" in block:  # without a key bias
        q_bias, v_bias = block["attn.q_bias"], block["attn.v_bias"]
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    qkv = F.linear(x, block["attn.qkv.weight"], qkv_bias)
    q, k, v = qkv.reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) / (d // heads) ** 0.5
    weights = (logits if bias is None else logits + bias).softmax(-1)
    y = (weights @ v).transpose(1, 2).reshape(b, n, d)
    return F.linear(y, block["attn.proj.weight"], block["attn.proj.bias"])


def relative(table, rows, columns):
    """Expands a table ((2 rows - 1)(2 columns - 1) + 3, h) to (h, 1 + n, 1 + n): query, key."""
    n = rows * columns
    index = torch.empty(1 + n, 1 + n, dtype=torch.long)
    for query in range(n):
        for key in range(n):
            down = query // columns - key // columns + rows - 1
            right = query % columns - key % columns + columns - 1
            index[1 + query, 1 + key] = down * (2 * columns - 1) + right
    index[0], index[:, 0], index[0, 0] = len(table) - 3, len(table) - 2, len(table) - 1
    return table[index].permute(2, 0, 1)
