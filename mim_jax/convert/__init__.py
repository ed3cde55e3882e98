"""Weights of others, read safely and called by our names; and ours by theirs."""

from mim_jax.convert.network import Network
from mim_jax.convert.states import from_torch, to_torch

__all__ = ["Network", "from_torch", "to_torch"]
