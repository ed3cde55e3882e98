r"""Linear probes of all blocks of BEiT's ViT-B/16 (Bao et al., 2021, appendix D).

Requires a run of configs/beit_base.py.

    mim-jax train --config=configs/beit_base_linear.py

The paper reports 56.7 % top-1 for the best block, the 9th. Not yet run here.
"""

from ml_collections import ConfigDict

from . import mae_base_linear


def get_config() -> ConfigDict:
    config = mae_base_linear.get_config()
    config.batch_size = 1024  # appendix D
    config.epochs = 50.0  # appendix D
    config.init_from.encoder = "runs/beit_base"
    config.model.positions = "learned"
    config.model.key_bias = False
    config.objective = dict(
        name="classify",
        pooling="layers",  # run_linear_eval.py, like all values below
        tuned_blocks=0.0,
        head_std=0.01,
    )
    config.data.clip_crop = False
    config.data.interpolation = "bilinear"
    config.optimizer = dict(name="adamw", lr=4e-3, weight_decay=1e-4)  # appendix D
    return config
