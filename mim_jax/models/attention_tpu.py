"""Attention by Pallas kernels for TPUs, over queries, keys and values in one array.

XLA needs the heads as an axis of their own: on a TPU these are copies of qkv in which heads of 32
or 64 features are padded to 128. The kernels split the heads inside, in memory that is on the chip.
A step of the grid computes all heads of one or two images, transposed: features or keys along
sublanes, queries along lanes. Heads are then slices of sublanes, which cost nothing, and a softmax
over keys adds up whole registers. Heads are taken in groups, stage by stage, so that the products
of one can be computed beside the softmax of another.

The forward pass keeps the logarithm of each softmax's sum (b, h, m), so that the backward pass has
no sums over keys to compute again (as in FlashAttention, Dao et al., 2022).

Shapes: b images, n tokens, m of them as queries, h heads, d width of a head.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOG2E = math.log2(math.e)  # exponentials are of base 2: one multiplication less per weight
GROUP = 4  # heads whose stages are interleaved
SHORT = 64  # tokens of an image up to which a step takes two images
MEMORY = 64 * 2**20  # bytes on the chip that kernels may take: v5e and later have that


def supports(qkv: jax.Array, heads: int, bias: jax.Array | None) -> bool:
    """Returns whether the kernels are for qkv (b, n, 3 h d) with bias (h, n, n).

    They are for bfloat16, heads of a multiple of 8 features, and sequences of which whole images
    fit into the memory on the chip.
    """
    width = qkv.shape[-1] // 3 // heads
    return qkv.dtype == jnp.bfloat16 and width % 8 == 0 and memory(qkv, heads, bias) <= MEMORY


def memory(qkv: jax.Array, heads: int, bias: jax.Array | None) -> int:
    """Returns how many bytes on the chip the backward pass takes, roughly.

    These are its blocks (two of each, as one is moved while the other is used), the same
    transposed, the weights of a few heads, and the bias and its gradient.
    """
    n, features = qkv.shape[1], qkv.shape[2] // 3
    blocks = 8 * rows_of(qkv) * n * features * qkv.dtype.itemsize
    scores = 4 * n * (-(-n // 128) * 128)
    return 3 * blocks + (4 if bias is None else 4 + 2 * heads) * scores


def rows_of(qkv: jax.Array) -> int:
    """Returns how many images a step of the grid takes."""
    return 2 if qkv.shape[1] <= SHORT and len(qkv) % 2 == 0 else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def attention(
    qkv: jax.Array, bias: jax.Array | None, heads: int, last: int, interpret: bool = False
) -> jax.Array:
    """qkv (b, n, 3 h d), bias (h, n, n) -> (b, m, h d), of the `last` m queries.

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
    for_qkv, *for_bias = call(
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
        return for_qkv, None
    of_queries = for_bias[0].swapaxes(1, 2).astype(bias.dtype)  # (h, m, n)
    return for_qkv, jnp.pad(of_queries, ((0, 0), (qkv.shape[1] - last, 0), (0, 0)))


attention.defvjp(attention_forward, attention_backward)


def by_key(bias: jax.Array, last: int) -> jax.Array:
    """bias (h, n, n) -> (h, n, m) by key and query, to be added to exponents of base 2."""
    return bias[:, -last:].swapaxes(1, 2).astype(jnp.float32) * LOG2E


def call(kernel, inputs, shared_inputs, outputs, shared_outputs, heads, last, products, interpret):
    """Runs a kernel over the images of inputs (b, ...) and outputs (b, ...).

    Shared arrays (h, n, m) are the same in all steps, and outputs among them stay on the chip until
    the last. `products` is how many the kernel takes for each head, for its estimated cost.
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
    """Returns the product of two matrices over these sides, in float32."""
    sides = (((side_a,), (side_b,)), ((), ()))
    return jax.lax.dot_general(a, b, sides, preferred_element_type=jnp.float32)


def groups(rows: int, heads: int) -> list[list[tuple[int, int]]]:
    """Returns all (image, head) of a step, in groups."""
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
    """Returns the logits (n, m) of a head as exponents of base 2."""
    logits = product(k, q, 0, 0) * (len(q) ** -0.5 * LOG2E)
    return logits + bias_ref[0][head] if bias_ref else logits


def forward_kernel(qkv_ref, *refs, heads, last):
    """Refs: qkv (rows, n, 3 h d), bias (h, n, m) or none; y (rows, m, h d), sums (rows, h, m)."""
    *bias_ref, y_ref, sums_ref = refs
    rows = len(qkv_ref)
    parts = [transpose_parts(qkv_ref[row], heads, last) for row in range(rows)]
    results = [[] for _ in range(rows)]
    for group in groups(rows, heads):
        of_group = [[part[head] for part in parts[row]] for row, head in group]
        logits = [
            exponents(q, k, bias_ref, head)
            for (q, k, _), (_, head) in zip(of_group, group, strict=True)
        ]
        largest = [x.max(0, keepdims=True) for x in logits]
        weights = [jnp.exp2(x - top) for x, top in zip(logits, largest, strict=True)]
        sums = [x.sum(0, keepdims=True) for x in weights]
        products = [
            product(v, x.astype(v.dtype), 1, 0)
            for (_, _, v), x in zip(of_group, weights, strict=True)
        ]
        for i, (row, head) in enumerate(group):
            results[row].append((products[i] * (1 / sums[i])).astype(y_ref.dtype))  # (d, m)
            sums_ref[row, head : head + 1, :] = largest[i] + jnp.log2(sums[i])
    for row in range(rows):
        y_ref[row] = jnp.concatenate(results[row]).T


def backward_kernel(qkv_ref, gradient_ref, y_ref, sums_ref, *refs, heads, last):
    """Refs: as of the forward kernel; then bias (h, n, m) or none, and the gradients of both."""
    if len(refs) == 3:
        bias_ref, (for_qkv_ref, for_bias_ref) = refs[:1], refs[1:]

        @pl.when(pl.program_id(0) == 0)
        def _():
            for_bias_ref[...] = jnp.zeros_like(for_bias_ref)

    else:
        bias_ref, (for_qkv_ref,), for_bias_ref = (), refs, None
    (rows, n, _), d = qkv_ref.shape, y_ref.shape[2] // heads
    parts = [transpose_parts(qkv_ref[row], heads, last) for row in range(rows)]
    gradients, outputs = ([ref[row].T for row in range(rows)] for ref in (gradient_ref, y_ref))
    results = [([], [], []) for _ in range(rows)]
    for group in groups(rows, heads):
        of_group = [[part[head] for part in parts[row]] for row, head in group]
        of_y = [gradients[row][head * d : (head + 1) * d] for row, head in group]
        weights = [
            jnp.exp2(exponents(q, k, bias_ref, head) - sums_ref[row, head : head + 1, :])
            for (q, k, _), (row, head) in zip(of_group, group, strict=True)
        ]
        of_weights = [product(v, g, 0, 0) for (_, _, v), g in zip(of_group, of_y, strict=True)]
        means = [  # of these gradients by the weights: sums over d are shorter than over n
            (
                g.astype(jnp.float32) * outputs[row][head * d : (head + 1) * d].astype(jnp.float32)
            ).sum(0, keepdims=True)
            for g, (row, head) in zip(of_y, group, strict=True)
        ]
        of_logits = [x * (y - mean) for x, y, mean in zip(weights, of_weights, means, strict=True)]
        for i, (row, head) in enumerate(group):
            q, k, v = of_group[i]
            if for_bias_ref is not None:
                for_bias_ref[head] += of_logits[i]
            narrow = of_logits[i].astype(v.dtype)
            scale = d**-0.5
            for_q, for_k, for_v = (
                product(k, narrow, 1, 0) * scale,  # (d, m)
                product(q, narrow, 1, 1) * scale,  # (d, n)
                product(of_y[i], weights[i].astype(v.dtype), 1, 1),  # (d, n)
            )
            if last < n:
                for_q = jnp.concatenate([jnp.zeros((d, n - last), for_q.dtype), for_q], axis=1)
            for result, x in zip(results[row], (for_q, for_k, for_v), strict=True):
                result.append(x.astype(v.dtype))
    for row in range(rows):
        for_q, for_k, for_v = results[row]
        for_qkv_ref[row] = jnp.concatenate(for_q + for_k + for_v).T
