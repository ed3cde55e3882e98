r"""Linear probe of each layer of BEiT's ViT-B/16 on ImageNet-1k (Bao et al., 2021, appendix D).

First configs/beit_base.py, then

    python -m mim_jax.main --config=configs/beit_base_linear.py

The best layer is the 9th, with 56.7 % top-1 in the paper. Ours: not yet run.
"""

from ml_collections import ConfigDict

from configs import mae_base_linear


def get_config() -> ConfigDict:
    config = mae_base_linear.get_config()
    config.batch_size = 1024  # appendix D
    config.epochs = 50.0  # appendix D
    config.init_from.encoder = "runs/beit_base"
    config.model.positions = "learned"
    config.model.key_bias = False
    config.objective = dict(
        name="classify",
        pooling="layers",  # run_linear_eval.py, as all that follows
        tuned_blocks=0.0,
        head_std=0.01,
    )
    config.data.clip_crop = False
    config.data.interpolation = "bilinear"
    config.optimizer = dict(name="adamw", lr=4e-3, weight_decay=1e-4)  # appendix D
    return config
