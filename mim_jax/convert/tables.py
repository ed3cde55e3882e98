"""The names of our parameters in other libraries, as tables that are read in both directions.

`{i}` matches a number. `*` matches weight or bias, and in our names kernel (scale for a norm) or
bias. Sources: the keys of the official MAE, BEiT and DALL-E, of timm and transformers.
"""

from typing import NamedTuple


class Layout(NamedTuple):
    """The names of the arrays of a library's model."""

    title: str
    signs: tuple[str, ...]  # names that identify it
    table: dict[str, str]  # their name: our name


def block(theirs: str, ours: str, names: dict[str, str]) -> dict[str, str]:
    """Returns the rows of the arrays of a block."""
    return {f"{theirs}.{name}": f"{ours}/{our_name}" for name, our_name in names.items()}


BLOCK = {
    "norm1.*": "norm1/*",
    "attn.qkv.*": "qkv/*",
    "attn.proj.*": "proj/*",
    "norm2.*": "norm2/*",
    "mlp.fc1.*": "fc1/*",
    "mlp.fc2.*": "fc2/*",
}
BEIT_BLOCK = BLOCK | {
    "attn.q_bias": "q_bias",
    "attn.v_bias": "v_bias",
    "attn.relative_position_bias_table": "relative_position_bias/table",
    "gamma_1": "gamma_1",
    "gamma_2": "gamma_2",
}
HF_BLOCK = {  # query, key and value are concatenated before the lookup
    "layernorm_before.*": "norm1/*",
    "attention.attention.qkv.*": "qkv/*",
    "attention.output.dense.*": "proj/*",
    "layernorm_after.*": "norm2/*",
    "intermediate.dense.*": "fc1/*",
    "output.dense.*": "fc2/*",
}
HF_BEIT_BLOCK = HF_BLOCK | {
    "attention.attention.q_bias": "q_bias",
    "attention.attention.v_bias": "v_bias",
    "attention.attention.relative_position_bias.relative_position_bias_table": (
        "relative_position_bias/table"
    ),
    "lambda_1": "gamma_1",
    "lambda_2": "gamma_2",
}

POOLS = {0: 1, 1: 2, 2: 3, 3: 6}  # bins of UPerNet's poolings
LAST_POOL = "decode_head.psp_modules.3.1.conv.weight"

EMBEDDING = {
    "cls_token": "encoder/cls_token",
    "pos_embed": "encoder/positions",
    "patch_embed.proj.*": "encoder/embed/*",
}
HEAD = {"fc_norm.*": "fc_norm/*", "head.*": "head/*"}
VIT = {**EMBEDDING, **block("blocks.{i}", "encoder/block_{i}", BLOCK), "norm.*": "encoder/norm/*"}
BEIT = {
    **EMBEDDING,
    "mask_token": "encoder/mask_token",
    "rel_pos_bias.relative_position_bias_table": "encoder/relative_position_bias/table",
    **block("blocks.{i}", "encoder/block_{i}", BEIT_BLOCK),
    "norm.*": "encoder/norm/*",
}
STEM = {  # the ResNet of a hybrid
    "patch_embed.backbone.stem.conv.*": "encoder/stem/conv/*",
    "patch_embed.backbone.stem.norm.*": "encoder/stem/norm/*",
    **block(
        "patch_embed.backbone.stages.{s}.blocks.{i}",
        "encoder/stem/stage_{s}_block_{i}",
        {
            "conv{j}.*": "conv{j}/*",
            "norm{j}.*": "norm{j}/*",
            "downsample.conv.*": "shortcut/*",
            "downsample.norm.*": "shortcut_norm/*",
        },
    ),
}
DECODER = {
    "mask_token": "decoder/mask_token",
    "decoder_pos_embed": "decoder/positions",
    "decoder_embed.*": "decoder/embed/*",
    **block("decoder_blocks.{i}", "decoder/block_{i}", BLOCK),
    "decoder_norm.*": "decoder/norm/*",
    "decoder_pred.*": "decoder/pred/*",
}


def hugging_face(name: str, names: dict[str, str]) -> dict[str, str]:
    """Returns the rows of an encoder called `name`."""
    return {
        f"{name}.embeddings.cls_token": "encoder/cls_token",
        f"{name}.embeddings.mask_token": "encoder/mask_token",
        f"{name}.embeddings.position_embeddings": "encoder/positions",
        f"{name}.embeddings.patch_embeddings.projection.*": "encoder/embed/*",
        f"{name}.encoder.relative_position_bias.relative_position_bias_table": (
            "encoder/relative_position_bias/table"
        ),
        **block(f"{name}.encoder.layer.{{i}}", "encoder/block_{i}", names),
    }


HF_VIT = {**hugging_face("vit", HF_BLOCK), "vit.layernorm.*": "encoder/norm/*"}
HF_DECODER = {
    "decoder.mask_token": "decoder/mask_token",
    "decoder.decoder_pos_embed": "decoder/positions",
    "decoder.decoder_embed.*": "decoder/embed/*",
    **block("decoder.decoder_layers.{i}", "decoder/block_{i}", HF_BLOCK),
    "decoder.decoder_norm.*": "decoder/norm/*",
    "decoder.decoder_pred.*": "decoder/pred/*",
}
HF_BEIT = hugging_face("beit", HF_BEIT_BLOCK)


def norm_rows(theirs: str, ours: str) -> dict[str, str]:
    """Returns the rows of a batch normalization."""
    return {
        f"{theirs}.*": f"{ours}/*",
        f"{theirs}.running_mean": f"batch_statistics/{ours}/mean",
        f"{theirs}.running_var": f"batch_statistics/{ours}/variance",
    }


def segmentation(norm: str, backbone: str = "") -> dict[str, str]:
    """Returns the rows of UPerNet, its feature pyramid and its auxiliary decoder.

    `norm` is the name of the normalization after a convolution, `backbone` the prefix of the
    pyramid.
    """
    convolutions = {f"decode_head.psp_modules.{i}.1": f"head/pool_{s}" for i, s in POOLS.items()}
    for part, ours in (("lateral_convs", "lateral"), ("fpn_convs", "level")):
        convolutions[f"decode_head.{part}.{{i}}"] = f"head/{ours}_{{i}}"
    convolutions["decode_head.bottleneck"] = "head/bottleneck"
    convolutions["decode_head.fpn_bottleneck"] = "head/fusion"
    convolutions["auxiliary_head.convs.0"] = "auxiliary/conv"
    rows = {
        f"{backbone}fpn1.0.*": "pyramid/up4_first/*",
        **norm_rows(f"{backbone}fpn1.1", "pyramid/up4_norm"),
        f"{backbone}fpn1.3.*": "pyramid/up4_second/*",
        f"{backbone}fpn2.0.*": "pyramid/up2/*",
        "decode_head.classifier.*": "head/classes/conv/*",
        "auxiliary_head.classifier.*": "auxiliary/classes/conv/*",
    }
    for theirs, ours in convolutions.items():
        rows[f"{theirs}.conv.weight"] = f"{ours}/conv/kernel"
        rows |= norm_rows(f"{theirs}.{norm}", f"{ours}/norm")
    return rows


DALLE = {
    "blocks.input.*": "input/*",
    "blocks.group_{g}.block_{i}.id_path.*": "group_{g}_block_{i}/id_path/*",
    "blocks.group_{g}.block_{i}.res_path.conv_{j}.*": "group_{g}_block_{i}/conv_{j}/*",
    "blocks.output.conv.*": "output/*",
}


def small_dvae(layers: int) -> dict[str, str]:
    """Returns the rows of BEiT's own dVAE, whose layers are numbered by position."""
    rows = {"codebook.weight": "decoder/codebook"}
    for theirs, ours in (("encoder", "tokenizer"), ("decoder", "decoder")):
        for layer in range(layers):
            rows[f"{theirs}.{2 * layer}.0.*"] = f"{ours}/layer_{layer + 1}/*"
            for i in range(3):
                place = f"{theirs}.{2 * layer + 1}.net.{2 * i}.*"
                rows[place] = f"{ours}/layer_{layer + 1}_block_1/conv_{i + 1}/*"
        rows[f"{theirs}.{2 * layers}.*"] = f"{ours}/output/*"
    return rows


LAYOUTS = {  # layouts with more signs first
    "dalle": Layout("DALL-E's dVAE", ("blocks.input.weight",), DALLE),
    **{
        f"small_dvae_{layers}": Layout(
            f"BEiT's own dVAE of {layers} layers",
            ("codebook.weight", f"encoder.{2 * layers}.weight"),
            small_dvae(layers),
        )
        for layers in (1, 2, 3, 4)
    },
    "hf_vit_mae": Layout(
        "Hugging Face's ViTMAEForPreTraining",
        ("vit.embeddings.cls_token", "decoder.decoder_embed.weight"),
        {**HF_VIT, **HF_DECODER},
    ),
    "hf_vit": Layout(
        "Hugging Face's ViT",
        ("vit.embeddings.cls_token",),
        {**HF_VIT, "classifier.*": "head/*"},
    ),
    "hf_beit_mim": Layout(
        "Hugging Face's BeitForMaskedImageModeling",
        ("beit.embeddings.cls_token", "lm_head.weight"),
        {**HF_BEIT, "layernorm.*": "encoder/norm/*", "lm_head.*": "head/*"},
    ),
    "hf_beit_segment": Layout(
        "Hugging Face's BeitForSemanticSegmentation",
        ("beit.embeddings.cls_token", "fpn1.0.weight", LAST_POOL),
        {**HF_BEIT, **segmentation("bn")},
    ),
    "hf_upernet": Layout(
        "Hugging Face's UperNetForSemanticSegmentation with BEiT's encoder",
        ("backbone.embeddings.cls_token", "backbone.fpn1.0.weight", LAST_POOL),
        {
            **hugging_face("backbone", HF_BEIT_BLOCK),
            **segmentation("batch_norm", "backbone."),
        },
    ),
    "hf_beit": Layout(
        "Hugging Face's Beit",
        ("beit.embeddings.cls_token",),
        {
            **HF_BEIT,
            "beit.layernorm.*": "encoder/norm/*",
            "beit.pooler.layernorm.*": "fc_norm/*",
            "classifier.*": "head/*",
        },
    ),
    "mae": Layout("the official MAE", ("decoder_embed.weight", "cls_token"), {**VIT, **DECODER}),
    "mae_linear": Layout(
        "the linear probe of the official MAE",
        ("head.0.running_mean", "head.1.weight"),
        {
            **VIT,
            "head.0.running_mean": "batch_statistics/head_norm/mean",
            "head.0.running_var": "batch_statistics/head_norm/variance",
            "head.1.*": "head/*",
        },
    ),
    "beit": Layout(
        "the official BEiT, pretrained",
        ("lm_head.weight", "mask_token"),
        {**BEIT, "lm_head.*": "head/*"},
    ),
    "beit_finetuned": Layout(
        "the official BEiT, fine-tuned",
        ("blocks.0.attn.q_bias", "blocks.0.attn.relative_position_index"),
        {**BEIT, **HEAD},
    ),
    "timm_beit": Layout("timm's BEiT", ("blocks.0.attn.q_bias",), {**BEIT, **HEAD}),
    "timm_vit": Layout(
        "timm's ViT, and the official MAE's without its decoder",
        ("cls_token", "blocks.0.norm1.weight"),
        {
            **VIT,
            **HEAD,
            **STEM,
            "blocks.{i}.ls1.gamma": "encoder/block_{i}/gamma_1",
            "blocks.{i}.ls2.gamma": "encoder/block_{i}/gamma_2",
        },
    ),
}
SPELLINGS = {  # other spellings: DALL-E's, and transformers 5's in memory
    r"\b(blocks\..*)\.w$": r"\1.weight",
    r"\b(blocks\..*)\.b$": r"\1.bias",
    r"\bdecoder\.decoder_encoder\.layer\.": "decoder.decoder_layers.",
    r"\b(vit|beit)\.layers\.(\d+)\.relative_position_bias\.": (
        r"\1.encoder.layer.\2.attention.attention.relative_position_bias."
    ),
    r"\b(vit|beit)\.layers\.": r"\1.encoder.layer.",
    r"\bbeit\.shared_position_bias\.": "beit.encoder.relative_position_bias.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"(layers?\.\d+)\.mlp\.fc1\.": r"\1.intermediate.dense.",
    r"(layers?\.\d+)\.mlp\.fc2\.": r"\1.output.dense.",
    r"\bbackbone\.beit\.": "backbone.",
    r"\bfpn\.fpn1\.conv_transpose1\.": "fpn1.0.",
    r"\bfpn\.fpn1\.normalization\.": "fpn1.1.",
    r"\bfpn\.fpn1\.conv_transpose2\.": "fpn1.3.",
    r"\bfpn\.fpn2\.": "fpn2.0.",
    r"\bpsp_modules\.blocks\.(\d+)\.conv\.": r"psp_modules.\1.1.",
    r"\bdecode_head\.psp_bottleneck\.": "decode_head.bottleneck.",
    r"(_head\..*)\.convolution\.": r"\1.conv.",
    r"(_head\..*)\.normalization\.": r"\1.bn.",
}
