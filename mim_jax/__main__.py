"""`python -m mim_jax COMMAND`: the same as `mim-jax COMMAND`."""

from mim_jax.cli import entry

entry()
