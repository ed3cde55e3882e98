"""Conversion of weights from and to other libraries. Files are read without executing code."""

from mim_jax.convert.network import Network
from mim_jax.convert.states import from_torch, to_torch

__all__ = ["Network", "from_torch", "to_torch"]
