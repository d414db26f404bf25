"""The validation value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from tests.library.helpers import DATA, EXPERTS, OPTIMIZER, Loader, learn, squared


@pytest.mark.parametrize("value", [jnp.zeros(4), None, (jnp.zeros(()), jnp.zeros(())), jnp.array(1j)])
@pytest.mark.parametrize("data", [DATA[:11], Loader([DATA[:11]])], ids=["arrays", "loader"])
@pytest.mark.parametrize("starts", [False, True])
def test_a_validation_that_is_no_scalar_is_refused(value, data, starts):
    words = {"validation_data": data, "validation_fn": lambda params, batch: value}
    both = functools.partial(glue_jax.learn_from_starts, starts=jnp.zeros((2, 2))) if starts else glue_jax.learn
    with pytest.raises(ValueError, match=r"validation returned shape .*; expected a scalar"):
        both(jax.random.key(0), EXPERTS, DATA, loss_fn=squared, optimizer=OPTIMIZER, batch_size=8, **words)


def test_validation_has_batches_of_its_own_size():
    sizes = set()

    def largest(params, batch):
        sizes.add(len(batch))
        return jnp.max(batch) + 0 * params["w"]

    examples = jnp.arange(12.0)
    words = {"validation_data": examples, "validation_fn": largest, "max_steps": 1}
    # Means of the maxima of batches of 3, of 8 and 4.
    np.testing.assert_allclose(learn(validation_batch_size=3, **words).history.validation_values[0], 6.5)
    np.testing.assert_allclose(learn(**words).history.validation_values[0], (8 * 7 + 4 * 11) / 12, rtol=1e-6)
    assert sizes == {3, 8, 4}


def test_a_loader_validates_as_its_arrays_do_each_time_anew():
    examples = np.arange(12.0, dtype=np.float32) ** 2
    loader = Loader([examples[:5], examples[5:10], examples[10:]])
    words = {"loss_fn": squared, "data": examples, "batch_size": 4}
    by_loader, by_arrays = learn(validation_data=loader, **words), learn(validation_data=examples, **words)
    assert loader.epochs == 5
    np.testing.assert_allclose(by_loader.history.validation_values, by_arrays.history.validation_values, rtol=1e-6)
