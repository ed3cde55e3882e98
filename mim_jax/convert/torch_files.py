"""Writes files with torch.save."""

from pathlib import Path

import numpy as np
import torch


def save_file(state: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Saves {"model": state, **metadata}, which the official MAE and BEiT and timm read."""
    entries = {"model": {name: torch.tensor(x) for name, x in state.items()}} | metadata
    with path.open("wb") as file:  # raises OSError; torch.save raises RuntimeError for a path
        torch.save(entries, file)
