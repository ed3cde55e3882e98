"""Files as torch.save writes them."""

from pathlib import Path

import numpy as np
import torch


def save_file(state: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """{"model": the state dict, ...}, as the official MAE, BEiT and timm read it."""
    torch.save({"model": {name: torch.tensor(x) for name, x in state.items()}} | metadata, path)
