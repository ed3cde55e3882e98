"""Attention as Pallas kernels for TPUs, on an array of fused queries, keys and values.

XLA's attention needs a separate axis of heads. On a TPU this copies qkv and pads heads of 32 or 64
features to 128. The kernels split the heads in on-chip memory instead. A step of the grid computes
all heads of one or two images, transposed: features or keys along sublanes, queries along lanes.
Slicing heads along sublanes then costs nothing, and a softmax over keys adds up whole registers.
Heads are processed in groups, stage by stage, so that the matrix products of one head overlap with
the softmax of another.

The forward pass saves the logarithm of each softmax's sum (b, h, m), so that the backward pass does
not recompute sums over keys (as in FlashAttention, Dao et al., 2022).

Shapes: b images, n tokens, m of them as queries, h heads, d width of a head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2E = math.log2(math.e)  # exponentials have base 2, which saves a multiplication per weight
GROUP = 4  # heads whose stages are interleaved
SHORT = 64  # largest number of tokens for which a step takes two images
MEMORY = 64 * 2**20  # bytes of on-chip memory that kernels may use: v5e and later have that


def supports(qkv: jax.Array, heads: int, bias: jax.Array | None) -> bool:
    """Returns whether the kernels support qkv (b, n, 3 h d) with bias (h, n, n).

    They support bfloat16, heads whose width is a multiple of 8, and sequences that fit into the
    on-chip memory.
    """
    width = qkv.shape[-1] // 3 // heads
    return qkv.dtype == jnp.bfloat16 and width % 8 == 0 and memory(qkv, heads, bias) <= MEMORY


def memory(qkv: jax.Array, heads: int, bias: jax.Array | None) -> int:
    """Returns approximately how many bytes of on-chip memory the backward pass takes.

    These are its blocks (two of each, because one is copied while the other is used), their
    transposes, the weights of a few heads, and the bias and its gradient.
    """
    n, features = qkv.shape[1], qkv.shape[2] // 3
    blocks = 8 * rows_of(qkv) * n * features * qkv.dtype.itemsize
    scores = 4 * n * (-(-n // 128) * 128)
    return 3 * blocks + (4 if bias is None else 4 + 2 * heads) * scores


def rows_of(qkv: jax.Array) -> int:
    """Returns the number of images in a step of the grid."""
    return 2 if qkv.shape[1] <= SHORT and len(qkv) % 2 == 0 else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def attention(
    qkv: jax.Array, bias: jax.Array | None, heads: int, last: int, interpret: bool = False
) -> jax.Array:
    """qkv (b, n, 3 h d), bias (h, n, n) -> (b, m, h d), for the `last` m queries.

    With `interpret`, the kernels run on any device, for tests.
    """
    return attention_forward(qkv, bias, heads, last, interpret)[0]


def attention_forward(qkv, bias, heads, last, interpret):
    b, _, features = qkv.shape
    y, sums = call(
        forward_kernel,
        [qkv],
        [] if bias is None else [by_key(bias, last)],
        [
            jax.ShapeDtypeStruct((b, last, features // 3), qkv.dtype),
            jax.ShapeDtypeStruct((b, heads, last), jnp.float32),
        ],
        [],
        heads=heads,
        last=last,
        products=2,
        interpret=interpret,
    )
    return y, (qkv, bias, y, sums)


def attention_backward(heads, last, interpret, saved, gradient):
    qkv, bias, y, sums = saved
    biases = [] if bias is None else [by_key(bias, last)]
    dqkv, *dbias = call(
        backward_kernel,
        [qkv, gradient, y, sums],
        biases,
        [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)],
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in biases],
        heads=heads,
        last=last,
        products=5,
        interpret=interpret,
    )
    if bias is None:
        return dqkv, None
    dbias_by_query = dbias[0].swapaxes(1, 2).astype(bias.dtype)  # (h, m, n)
    return dqkv, jnp.pad(dbias_by_query, ((0, 0), (qkv.shape[1] - last, 0), (0, 0)))


attention.defvjp(attention_forward, attention_backward)


def by_key(bias: jax.Array, last: int) -> jax.Array:
    """bias (h, n, n) -> (h, n, m) by key and query, scaled for exponentials of base 2."""
    return bias[:, -last:].swapaxes(1, 2).astype(jnp.float32) * LOG2E


def call(kernel, inputs, shared_inputs, outputs, shared_outputs, heads, last, products, interpret):
    """Runs a kernel over the images of inputs (b, ...) and outputs (b, ...).

    Shared arrays (h, n, m) are the same in all steps; shared outputs stay on the chip until the
    last step. `products` is the number of matrix products per head, for the estimated cost.
    """
    (b, n, features), rows = inputs[0].shape, rows_of(inputs[0])

    def each(x):
        return pl.BlockSpec((rows, *x.shape[1:]), lambda i: (i, 0, 0))

    def whole(x):
        return pl.BlockSpec(x.shape, lambda i: (0, 0, 0))

    arrays = [*inputs, *shared_inputs, *outputs, *shared_outputs]
    return pl.pallas_call(
        functools.partial(kernel, heads=heads, last=last),
        grid=(b // rows,),
        in_specs=[*map(each, inputs), *map(whole, shared_inputs)],
        out_specs=[*map(each, outputs), *map(whole, shared_outputs)],
        out_shape=[*outputs, *shared_outputs],
        cost_estimate=pl.CostEstimate(
            flops=2 * products * b * last * n * features // 3,
            transcendentals=b * heads * last * n,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=MEMORY),
        interpret=interpret,
    )(*inputs, *shared_inputs)


def product(a: jax.Array, b: jax.Array, side_a: int, side_b: int) -> jax.Array:
    """Contracts two matrices over the axes `side_a` and `side_b`, in float32."""
    sides = (((side_a,), (side_b,)), ((), ()))
    return jax.lax.dot_general(a, b, sides, preferred_element_type=jnp.float32)


def groups(rows: int, heads: int) -> list[list[tuple[int, int]]]:
    """Returns the pairs (image, head) of a step, in groups."""
    pairs = [(row, head) for row in range(rows) for head in range(heads)]
    return [pairs[i : i + GROUP] for i in range(0, len(pairs), GROUP)]


def transpose_parts(qkv: jax.Array, heads: int, last: int) -> list[list[jax.Array]]:
    """qkv (n, 3 h d) -> queries, keys and values, each a list by head: (d, m), (d, n), (d, n)."""
    transposed = qkv.T
    d = len(transposed) // (3 * heads)
    parts = [transposed[i : i + d] for i in range(0, len(transposed), d)]
    queries, keys, values = (parts[i : i + heads] for i in (0, heads, 2 * heads))
    return [[q[:, -last:] for q in queries], keys, values]


def exponents(q, k, bias_ref, head: int) -> jax.Array:
    """Returns the logits (n, m) of a head, scaled for exponentials of base 2."""
    logits = product(k, q, 0, 0) * (len(q) ** -0.5 * LOG2E)
    return logits + bias_ref[0][head] if bias_ref else logits


def forward_kernel(qkv_ref, *refs, heads, last):
    """Refs: qkv (rows, n, 3 h d), bias (h, n, m) or none; y (rows, m, h d), sums (rows, h, m)."""
    *bias_ref, y_ref, sums_ref = refs
    rows = len(qkv_ref)
    parts = [transpose_parts(qkv_ref[row], heads, last) for row in range(rows)]
    results = [[] for _ in range(rows)]
    for group in groups(rows, heads):
        inputs = [[part[head] for part in parts[row]] for row, head in group]
        logits = [
            exponents(q, k, bias_ref, head)
            for (q, k, _), (_, head) in zip(inputs, group, strict=True)
        ]
        largest = [x.max(0, keepdims=True) for x in logits]
        weights = [jnp.exp2(x - top) for x, top in zip(logits, largest, strict=True)]
        sums = [x.sum(0, keepdims=True) for x in weights]
        products = [
            product(v, x.astype(v.dtype), 1, 0)
            for (_, _, v), x in zip(inputs, weights, strict=True)
        ]
        for i, (row, head) in enumerate(group):
            results[row].append((products[i] * (1 / sums[i])).astype(y_ref.dtype))  # (d, m)
            sums_ref[row, head : head + 1, :] = largest[i] + jnp.log2(sums[i])
    for row in range(rows):
        y_ref[row] = jnp.concatenate(results[row]).T


def backward_kernel(qkv_ref, gradient_ref, y_ref, sums_ref, *refs, heads, last):
    """Refs: those of the forward kernel; then bias (h, n, m) or none, and both gradients."""
    if len(refs) == 3:
        bias_ref, (dqkv_ref, dbias_ref) = refs[:1], refs[1:]

        @pl.when(pl.program_id(0) == 0)
        def _():
            dbias_ref[...] = jnp.zeros_like(dbias_ref)

    else:
        bias_ref, (dqkv_ref,), dbias_ref = (), refs, None
    (rows, n, _), d = qkv_ref.shape, y_ref.shape[2] // heads
    parts = [transpose_parts(qkv_ref[row], heads, last) for row in range(rows)]
    gradients, outputs = ([ref[row].T for row in range(rows)] for ref in (gradient_ref, y_ref))
    results = [([], [], []) for _ in range(rows)]
    for group in groups(rows, heads):
        inputs = [[part[head] for part in parts[row]] for row, head in group]
        dy = [gradients[row][head * d : (head + 1) * d] for row, head in group]
        weights = [
            jnp.exp2(exponents(q, k, bias_ref, head) - sums_ref[row, head : head + 1, :])
            for (q, k, _), (row, head) in zip(inputs, group, strict=True)
        ]
        dweights = [product(v, g, 0, 0) for (_, _, v), g in zip(inputs, dy, strict=True)]
        means = [  # of dweights, weighted by weights: equal to sums over d, shorter than over n
            (
                g.astype(jnp.float32) * outputs[row][head * d : (head + 1) * d].astype(jnp.float32)
            ).sum(0, keepdims=True)
            for g, (row, head) in zip(dy, group, strict=True)
        ]
        dlogits = [x * (y - mean) for x, y, mean in zip(weights, dweights, means, strict=True)]
        for i, (row, head) in enumerate(group):
            q, k, v = inputs[i]
            if dbias_ref is not None:
                dbias_ref[head] += dlogits[i]
            narrow = dlogits[i].astype(v.dtype)
            scale = d**-0.5
            dq, dk, dv = (
                product(k, narrow, 1, 0) * scale,  # (d, m)
                product(q, narrow, 1, 1) * scale,  # (d, n)
                product(dy[i], weights[i].astype(v.dtype), 1, 1),  # (d, n)
            )
            if last < n:
                dq = jnp.concatenate([jnp.zeros((d, n - last), dq.dtype), dq], axis=1)
            for result, x in zip(results[row], (dq, dk, dv), strict=True):
                result.append(x.astype(v.dtype))
    for row in range(rows):
        dq, dk, dv = results[row]
        dqkv_ref[row] = jnp.concatenate(dq + dk + dv).T
