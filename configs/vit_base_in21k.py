r"""ViT-B/16, supervised, ImageNet-21k, 90 epochs (Dosovitskiy et al., 2020, table 3).

    python -m mim_jax.main --config=configs/vit_base_in21k.py

Then vit_base_finetune.py. The paper's has dropout of 0.1, and its rate falls in a line; this one
has none, and half a cosine. Ours: not yet run.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 4096  # table 3, as all that is not marked
    config.epochs = 90.0

    config.model = dict(size="B", patch=16, positions="learned")
    config.objective = dict(name="classify", pooling="cls", head_std=0.0, mean=(0.5,), std=(0.5,))
    config.data = dict(
        name="folder:/data/imagenet21k",
        labels="folder",
        size=224,
        crop_scale=(0.05, 1.0),  # its code
    )
    config.optimizer = dict(
        name="adamw",
        lr=1e-3,
        b1=0.9,
        b2=0.999,
        weight_decay=0.03,
        warmup_steps=10_000,
        clip_norm=1.0,
    )

    config.evaluate = dict(every_epochs=1.0)
    config.pictures = dict(every_epochs=10.0)
    config.save = dict(every_epochs=1.0)
    return config
