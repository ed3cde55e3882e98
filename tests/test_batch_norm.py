"""Batch normalization in groups against PyTorch's, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="normalization is compared with PyTorch's")

from mim_jax import UserError  # noqa: E402
from mim_jax.models.batch_norm import BatchNorm  # noqa: E402
from mim_jax.sharding import make_mesh, over_devices, to_global  # noqa: E402
from tests.test_upernet import float64, nchw, nhwc  # noqa: E402, F401

B, WIDTH = 4, 8


def test_groups_are_normalized_independently():
    """Each group as PyTorch's module normalizes it; the running statistics are their mean."""
    x = np.random.default_rng(0).normal(size=(B, 3, 5, WIDTH))
    module = BatchNorm(2)
    variables = module.init(jax.random.key(0), x, False)
    ours, after = module.apply(variables, x, True, mutable=["batch_statistics"])
    running = []
    for group in (slice(0, 2), slice(2, 4)):
        reference = torch.nn.BatchNorm2d(WIDTH).double()
        np.testing.assert_allclose(ours[group], nhwc(reference(nchw(x[group]))), atol=1e-10)
        running.append(reference.running_var.numpy())
    after = after["batch_statistics"]["variance"]
    np.testing.assert_allclose(after, np.mean(running, axis=0), atol=1e-10)
    with pytest.raises(UserError, match=r"objective\.batch_norm = 3 does not divide the 4 images"):
        BatchNorm(3).apply(variables, x, True, mutable=["batch_statistics"])


@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize(("devices", "group"), [(2, 8), (8, 8), (4, 2), (2, 4)])
def test_the_same_on_several_devices(devices, group, fsdp):
    """A group on one device, or the whole batch over all of them: also its gradients."""
    module = BatchNorm(group)
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 3, WIDTH)), "weights": rng.normal(size=(8, 3, WIDTH))}
    params = {"weight": rng.normal(size=(WIDTH, WIDTH))}
    buffers = module.init(jax.random.key(0), batch["x"], False)

    def loss(params, buffers, rows):
        y, changed = module.apply(
            buffers, rows["x"] @ params["weight"], True, mutable=["batch_statistics"]
        )
        total = (jnp.tanh(y) * rows["weights"]).sum()
        return total, ({"loss": total}, changed)

    results = []
    for mesh in (make_mesh(jax.devices()[:1]), make_mesh(jax.devices()[:devices], fsdp=fsdp)):
        gradient = over_devices(jax.grad(loss, has_aux=True), mesh, 1)
        results.append(jax.jit(gradient)(params, buffers, to_global(batch, mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), *results)
