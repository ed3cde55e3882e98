r"""SimMIM, ViT-B/16, ImageNet-1k, 800 epochs (Xie et al., 2021; its code, vit_base__800ep).

    python -m mim_jax.main --config=configs/simmim_base.py --workdir=runs/simmim_base

BEiT without a tokenizer: squares of 32 x 32 pixels are hidden at random, a linear head predicts
their colours. The paper reports 83.8 % top-1 after fine-tuning (table 6). Ours: not yet run; the
rate falls along a cosine here, in the code by ten at epoch 700.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 2048
    config.epochs = 800.0

    config.model = dict(
        size="B",
        patch=16,
        positions="none",
        relative_bias="shared",
        layer_scale=0.1,
        key_bias=False,
        drop_path=0.1,
        initializer="beit",
    )
    config.objective = dict(
        name="beit",
        sampling="random",
        mask_unit=2,
        num_masked=120,  # 30 of 49 squares: 60 %, rounded up
        target="pixels",
        error="absolute",
    )
    config.data = dict(
        name="imagenet2012", size=224, crop_scale=(0.67, 1.0), interpolation="bilinear"
    )
    config.optimizer = dict(
        name="adamw",
        base_lr=5e-5,  # 1e-4 for 512 images
        min_lr=2e-5,
        warmup_epochs=10.0,
        weight_decay=0.05,
        undecayed=("cls_token", "mask_token"),
        clip_norm=5.0,
    )
    config.evaluate = dict(every_epochs=10.0)
    config.pictures = dict(every_epochs=10.0)
    config.save = dict(every_epochs=5.0)
    return config
