"""RegMean: merges experts layer by layer in closed form, from forward passes alone.

The method is that of Jin et al., 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models"
(https://arxiv.org/abs/2212.09849). The merged linear layer should reproduce the outputs of each expert i on that
expert's own inputs X_i. So its kernel W minimises `sum_i ||X_i W - X_i W_i||^2`. The minimum depends on the inputs only
through the Gram matrices `X_i^T X_i`. The Gram matrices of several minibatches add up.

The library cannot see the layers of a network. So record the inputs of each layer yourself, and make their Gram
matrices with `layer_gram` and `conv_gram`.
"""

import itertools
import math
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from glue_jax.blending import blend
from glue_jax.checks import as_number
from glue_jax.coefficients import uniform
from glue_jax.experts import num_experts
from glue_jax.paths import by_name, check_finite
from glue_jax.types import Params

_HIGHEST = jax.lax.Precision.HIGHEST
# Eigenvalues below this, times the number of features and the number format's rounding, count as 0.
_LEAST_EIGENVALUE = 10.0


def layer_gram(inputs: ArrayLike) -> jax.Array:
    """Returns the Gram matrix `X^T X` of a linear layer's inputs. Add the Gram matrices of several minibatches.

    Args:
        inputs: the inputs, floating point `[..., in_features]`. All axes before the last one are rows of X.

    Returns:
        The Gram matrix, `[in_features, in_features]`, in at least float32.

    Raises:
        ValueError: if the inputs have no axis.

    Examples:
        >>> import jax.numpy as jnp
        >>> from glue_jax.merging.regmean import layer_gram
        >>> layer_gram(jnp.array([[1.0, 2.0], [0.0, 3.0]]))
        Array([[ 1.,  2.],
               [ 2., 13.]], dtype=float32)
    """
    inputs = jnp.asarray(inputs)
    if not inputs.ndim:
        raise ValueError(f"inputs have shape {inputs.shape}; expected [..., in_features]")
    rows = inputs.reshape(-1, inputs.shape[-1])
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.einsum("ni,nj->ij", rows, rows, precision=_HIGHEST, preferred_element_type=dtype)


def conv_gram(
    inputs: ArrayLike,
    kernel_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: int | str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
    """Returns the Gram matrix of a convolution's inputs. A convolution is a linear layer on patches of its inputs.

    Args:
        inputs: the inputs, floating point `[B, *spatial, C]`.
        kernel_shape: the shape of the kernel, `[*window, C, out_features]`, as in Flax. A grouped convolution is
            refused, because it is not one linear layer.
        strides: one stride for each spatial axis, or one for all.
        padding: as for `jax.lax.conv_general_dilated`, or the number of zeros on each side of every spatial axis.

    Returns:
        The Gram matrix, `[in, in]` with `in = prod(window) * C`, in at least float32. Its rows have the order of the
        kernel's axes, so it belongs to `kernel.reshape(in, out_features)`.

    Raises:
        ValueError: if the inputs do not have the kernel's rank or number of channels.
    """
    inputs = jnp.asarray(inputs)
    *window, channels, _ = kernel_shape
    rank = len(window)
    if not 1 <= rank <= 3:
        raise ValueError(f"kernel_shape is {tuple(kernel_shape)}; expected [*window, in, out] with 1 to 3 window axes")
    if inputs.ndim != rank + 2 or inputs.shape[-1] != channels:
        raise ValueError(
            f"inputs have shape {inputs.shape}; expected [B, *spatial, {channels}] with {rank} spatial axes for a "
            f"kernel of shape {tuple(kernel_shape)} (a grouped convolution has no Gram matrix)"
        )
    axes = "DHW"[-rank:]
    patches = jax.lax.conv_general_dilated_patches(
        inputs,
        tuple(window),
        (strides,) * rank if isinstance(strides, int) else tuple(strides),
        [(padding, padding)] * rank if isinstance(padding, int) else padding,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        precision=_HIGHEST,
    )
    # In a patch the channel is the first axis, in a kernel it is the last one.
    gram = layer_gram(patches).reshape(channels, math.prod(window), channels, math.prod(window))
    return gram.transpose(1, 0, 3, 2).reshape(channels * math.prod(window), -1)


def regmean_merge(experts: Params, grams: Mapping[str, ArrayLike], *, scale: float = 0.9) -> Params:
    """Merges the linear layers of experts by their inputs, and averages all other leaves uniformly (Jin et al., 2023).

    A kernel becomes `(sum_i G_i)^-1 sum_i G_i W_i` (https://arxiv.org/abs/2212.09849, Eq. 2). G_i is the Gram matrix of
    expert i with its off-diagonal entries multiplied by `scale` (section 3.3 of that paper). Leaves without a Gram
    matrix are averaged, such as biases, norms, depthwise kernels and embeddings.

    The sum of the Gram matrices may be singular, for example if a feature is 0 in all inputs. So the function solves
    for the difference from the uniform average, by a pseudo-inverse. It first scales the diagonal of the sum to 1. Then
    it treats small eigenvalues as 0: those below `10 * in` times the rounding error of the number format. With 64
    features in float32, this is 8e-5. In directions that no input has, the result is the uniform average.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        grams: for the path of each kernel (`glue_jax.paths.leaf_paths`; without `/value` for an `nnx.State`), the Gram
            matrices `[K, in, in]` of the experts' own inputs to the layer, from `layer_gram` or `conv_gram`. The weight
            of an expert grows with its number of inputs, so give all experts the same number. A kernel is `[*in_axes,
            *out_axes]`, as in Flax, and `in` is the product of its first axes. Transpose a PyTorch weight first.
        scale: from 0, which uses the diagonals alone, to 1, which is least squares.

    Returns:
        The merged model, each leaf `[...]` in the dtype of the experts, computed in at least float32. Leaves that are
        not floating point are the first expert's.

    Raises:
        ValueError: if the experts do not have a path of `grams`, or if a kernel is not floating point.
        ValueError: if Gram matrices do not fit their kernel; the error shows both shapes.
        ValueError: if Gram matrices are not finite. Traced values are not checked.
        ValueError: if `scale` is out of its range.
        TypeError: if `grams` is no mapping, or if `scale` is no real number.

    Examples:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> experts = {"kernel": jnp.array([[[1.0], [0.0]], [[3.0], [4.0]]])}
        >>> # The first feature is larger in the first expert's inputs, the second one in the second expert's.
        >>> grams = {"kernel": jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]])}
        >>> glue_jax.merging.regmean_merge(experts, grams)["kernel"]
        Array([[1.5],
               [3. ]], dtype=float32)
    """
    k = num_experts(experts)
    if not isinstance(grams, Mapping):
        raise TypeError(f"grams is a {type(grams).__name__}; expected a mapping from kernels' paths to [K, in, in]")
    if not 0 <= as_number("scale", scale) <= 1:
        raise ValueError(f"scale is {scale}; expected a number from 0 to 1")
    leaves = by_name(experts)
    grams = {path: jnp.asarray(gram) for path, gram in grams.items()}
    for path, gram in grams.items():
        _check_gram(path, gram, leaves, k)
    check_finite("grams", grams, stacked=True)
    alpha = uniform(k)
    merged = [
        _merge(jnp.asarray(leaf), grams[path], scale) if path in grams else blend(leaf, alpha)
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(experts), merged)


def _check_gram(path: str, gram: jax.Array, leaves: Mapping[str, jax.Array], k: int) -> None:
    """Refuses a Gram matrix that has no kernel, or that does not fit it."""
    if path not in leaves:
        raise ValueError(f"grams has the path {path!r}; expected paths of the experts, {list(leaves)}")
    shape, dtype = jnp.shape(leaves[path]), jnp.result_type(leaves[path])
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"grams has the path {path}, but the experts hold {dtype} there; expected a floating-point kernel"
        )
    sizes = list(itertools.accumulate(shape[1:], operator.mul))
    if gram.ndim != 3 or gram.shape[0] != k or gram.shape[1] != gram.shape[2] or gram.shape[1] not in sizes:
        raise ValueError(
            f"grams has shape {gram.shape} at {path}; expected [K, in, in] with K = {k}, where in is one of {sizes}, "
            f"the products of the first axes of the experts' kernel, whose shape is {shape}"
        )


def _merge(kernels: jax.Array, grams: jax.Array, scale: float) -> jax.Array:
    """Returns one merged kernel `[...]`, from all experts' kernels `[K, ...]` and Gram matrices `[K, in, in]`."""
    dtype = jnp.promote_types(kernels.dtype, jnp.float32)
    size = grams.shape[1]
    matrices = kernels.astype(dtype).reshape(len(kernels), size, -1)
    grams = grams.astype(dtype) * (scale + (1 - scale) * jnp.eye(size, dtype=dtype))[None]
    mean, total = jnp.mean(matrices, axis=0), jnp.sum(grams, axis=0)
    right = jnp.einsum("kij,kjo->io", grams, matrices - mean[None], precision=_HIGHEST)
    diagonal = jnp.diagonal(total)
    # A feature that is 0 in all inputs is 0 on the right side too, so any scale will do.
    to_unit = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))[:, None]
    values, vectors = jnp.linalg.eigh(total * to_unit * to_unit.T)
    is_seen = values > _LEAST_EIGENVALUE * size * jnp.finfo(dtype).eps
    inverses = jnp.where(is_seen, 1 / jnp.where(is_seen, values, 1), 0)[:, None]
    along = inverses * jnp.matmul(vectors.T, to_unit * right, precision=_HIGHEST)
    difference = to_unit * jnp.matmul(vectors, along, precision=_HIGHEST)
    return (mean + difference).reshape(kernels.shape[1:]).astype(kernels.dtype)
