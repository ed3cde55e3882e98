"""Names and shapes of the arrays in a tree."""

import jax


def abstract(x: jax.Array | jax.ShapeDtypeStruct, sharding=None) -> jax.ShapeDtypeStruct:
    """Returns the shape, dtype and sharding of an array; `sharding` replaces its own."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)


def shapes(tree) -> dict[str, tuple]:
    """Returns {"block_0/qkv/kernel": (192, 576), ...}."""
    return {name: x.shape for name, x in flat(tree).items()}


def flat(tree) -> dict:
    """Returns {"block_0/qkv/kernel": array, ...}."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {name_of(path): x for path, x in leaves}


def name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
