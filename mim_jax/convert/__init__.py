"""Reads weights of other libraries safely, and converts weights in both directions."""

from mim_jax.convert.network import Network
from mim_jax.convert.states import from_torch, to_torch

__all__ = ["Network", "from_torch", "to_torch"]
