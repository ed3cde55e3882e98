r"""A small ViT from scratch on 1000 labeled images of CIFAR-10: the baseline of cifar10_finetune.

    mim-jax train --config=configs/cifar10_scratch.py

32.9 % of the test images are classified correctly at the end: the mean of five seeds.
"""

from ml_collections import ConfigDict

from . import emoji_scratch


def get_config() -> ConfigDict:
    config = emoji_scratch.get_config()
    config.batch_size = 64
    config.steps = 400
    config.model.update(patch=4)
    config.objective.update(
        mixup_group=64, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262), erasing=0.0
    )
    config.data.update(
        name="cifar10",
        split="train[:1000]",
        evaluation_split="test",
        size=32,
        crop_scale=(0.4, 1.0),
    )
    config.optimizer.update(base_lr=2e-3, layer_decay=1.0, warmup_steps=40)
    config.evaluate = dict(every_steps=100)
    config.pictures = dict(every_steps=400)
    config.save = dict(every_steps=400)
    return config
