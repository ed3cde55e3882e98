r"""A tokenizer of CIFAR-10, 1024 codes, 8 x 8 tokens an image: half an hour on two cores.

    python -m mim_jax.main --config=configs/dvae_cifar10.py --workdir=runs/dvae_cifar10 \
        --config.data.name=folder:/data/cifar10 --config.data.evaluation_split=test
"""

from ml_collections import ConfigDict

from configs import dvae_emoji


def get_config() -> ConfigDict:
    config = dvae_emoji.get_config()
    config.tokenizer.update(vocabulary=1024, stem=4)
    config.data.update(name="cifar10", evaluation_split="test", size=32)
    return config
