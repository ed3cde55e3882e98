r"""Fine-tuning the supervised ViT-B/16 on ImageNet-1k at 384 (Dosovitskiy et al., 2020, B.1.1).

First configs/vit_base_in21k.py, then

    python -m mim_jax.main --config=configs/vit_base_finetune.py

The paper reports 83.97 % top-1 (table 5); lr is the best of 0.003, 0.01, 0.03, 0.06. Ours: not yet
run.
"""

from ml_collections import ConfigDict

from configs import vit_base_in21k


def get_config() -> ConfigDict:
    config = vit_base_in21k.get_config()
    config.batch_size = 512  # table 4, as all that follows
    config.epochs, config.steps = 0.0, 20_000
    config.init_from = dict(encoder="runs/vit_base_in21k")
    config.data.name, config.data.labels, config.data.size = "imagenet2012", "", 384
    config.data.crop_fraction = 1.0
    config.optimizer = dict(name="sgd", lr=0.03, momentum=0.9, warmup_steps=500, clip_norm=1.0)
    return config
