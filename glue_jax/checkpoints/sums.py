"""Weighted sums of tensors on the host, one expert after another."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The names of BatchNorm's running variances, in PyTorch and in Flax.
_VARIANCES = ("running_var", "/var")
# Elements that are added at once, 4 MB in float32 at most.
_PORTION, _LEAST = 2**20, 64


class NonFiniteError(ValueError):
    """A sum is infinite or NaN. The attribute `name` is the name of the tensor."""

    def __init__(self, name: str, value: float) -> None:
        """Keeps the name of the tensor, and one wrong value."""
        super().__init__(f"the blend holds {value} at {name}; expected finite numbers")
        self.name = name


def weighted_sums(
    experts: Iterable[dict[str, np.ndarray]], alpha_of: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns `sum_i alpha_i theta_i` (Eq. 1) for some tensors, in the dtypes of the experts.

    The sum is taken in float32, or in the tensor's own dtype if that has more bits. It is rounded once, at the end.
    On x86 XLA multiplies and adds with one rounding, so the blend has the bits of mergekit's linear merge (a test).

    Args:
        experts: the tensors of one expert after another, by their names.
        alpha_of: the coefficients `[K]` of a tensor, by its name.

    Returns:
        The blend, by name. A tensor that is not floating point is the first expert's.

    Raises:
        NonFiniteError: if a sum is infinite or NaN, a ValueError that names the tensor.
    """
    sums: dict[str, np.ndarray] = {}
    dtypes: dict[str, np.dtype] = {}
    with jax.default_device(_host()):
        for index, arrays in enumerate(experts):
            for name in list(arrays):
                array = arrays.pop(name)
                weight = alpha_of(name)[index]
                dtypes[name] = array.dtype
                if not jnp.issubdtype(array.dtype, jnp.inexact):
                    sums.setdefault(name, array)
                    continue
                if index == 0:
                    sums[name] = np.zeros(array.shape, jnp.promote_types(array.dtype, jnp.float32))
                if array.dtype.itemsize > 4:
                    # JAX has no float64 by default.
                    sums[name] += weight * array
                else:
                    _add(sums[name].reshape(-1), array.reshape(-1), np.float32(weight))
    return {name: _finished(name, sums.pop(name), dtype) for name, dtype in dtypes.items()}


def _host() -> Any:
    """Returns a CPU of JAX, or JAX's first device if it may use no CPU."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]


def _add(total: np.ndarray, tensor: np.ndarray, weight: np.float32) -> None:
    """Adds a tensor, times its coefficient, to a sum in place, `[N]`, one portion after another.

    All portions have one length, so that one program serves tensors of all shapes.
    """
    for start in range(0, total.size, _PORTION):
        here = slice(start, start + _PORTION)
        count = total[here].size
        # The last portion is padded to a power of two. Very short programs would round differently.
        padding = (0, max(_LEAST, 1 << (count - 1).bit_length()) - count)
        padded = (np.pad(part[here], padding) if padding[1] else part[here] for part in (total, tensor))
        total[here] = np.asarray(_add_portion(*padded, weight))[:count]


@jax.jit
def _add_portion(total: jax.Array, tensor: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the sum for one portion, in float32."""
    return total + weight * tensor.astype(jnp.float32)


def _finished(name: str, total: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a sum in the experts' dtype, checked."""
    total = total.astype(dtype, copy=False)
    if jnp.issubdtype(dtype, jnp.inexact) and not np.isfinite(total).all():
        raise NonFiniteError(name, total[~np.isfinite(total)][0])
    check_variance(name, total)
    return total


def is_variance(name: str) -> bool:
    """Returns whether a tensor is a running variance of BatchNorm, by its name. An `nnx.State` adds `/value` to it."""
    return name.removesuffix("/value").endswith(_VARIANCES)


def check_variance(name: str, array: np.ndarray) -> None:
    """Refuses negative running variances of BatchNorm, which it knows by the tensor's name."""
    if is_variance(name) and array.size and array.min() < 0:
        raise ValueError(
            f"the blend holds the variance {array.min():.3g} at {name}, since a coefficient is negative. No network "
            "can use it: take positive coefficients, or measure BatchNorm's statistics anew, as glue-jax learn and "
            "glue_jax.merging.refresh_statistics do"
        )
