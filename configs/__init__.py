"""Configs: one file for each recipe. Installed as `mim_jax.configs`."""
