r"""BEiT's ViT-L/16 fine-tuned on ImageNet-22k: the step between (README.md).

First configs/beit_large_in22k.py, then

    python -m mim_jax.main --config=configs/beit_large_in22k_finetune.py

21,841 classes; what begins with it has a new head. Released: 87.4 % top-1 on ImageNet-1k after
it, at 224 x 224. Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import beit_large_finetune


def get_config() -> ConfigDict:
    config = beit_large_finetune.get_config()
    config.batch_size = 2048  # README.md, as all that follows
    config.epochs = 90.0
    config.init_from.encoder = "runs/beit_large_in22k"
    config.model.positions = "none"
    config.model.relative_bias = "own"
    config.model.layer_scale = 1e-5
    config.model.drop_path = 0.2
    config.objective.mixup = config.objective.cutmix = 0.0
    config.objective.mean = config.objective.std = (0.5,)
    config.data.name, config.data.labels = "folder:/data/imagenet22k", "folder"
    config.data.fill = (128, 128, 128)
    config.optimizer.lr = 2e-3
    config.optimizer.layer_decay = 0.75
    config.optimizer.undecayed = ("cls_token",)
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.clip_norm = 1.0
    return config
