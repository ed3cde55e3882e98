r"""Fine-tuning of BEiT's ViT-L/16 at 384 x 384 for 10 more epochs (Bao et al., 2021, section 3.1).

Requires a run of configs/beit_large_finetune.py.

    mim-jax train --config=configs/beit_large_finetune_384.py

The paper reports 86.3 % top-1 (table 1) but no settings except the number of epochs. The others
are those of the official README for weights that were already fine-tuned, with a shorter warm-up.
Not yet run here.
"""

from ml_collections import ConfigDict

from . import beit_large_finetune


def get_config() -> ConfigDict:
    config = beit_large_finetune.get_config()
    config.batch_size = 512  # README.md, like all values without a comment
    config.epochs = 10.0  # section 3.1
    config.init_from.encoder = "runs/beit_large_finetune"
    config.model.drop_path = 0.4
    config.objective.mixup = config.objective.cutmix = 0.0
    config.data.size = 384
    config.data.crop_fraction = 1.0  # datasets.py, from 384
    config.optimizer.lr = 2e-5
    config.optimizer.layer_decay = 0.9
    config.optimizer.weight_decay = 1e-8
    config.optimizer.warmup_epochs = 2.0  # README.md: 5 of 30 epochs
    return config
