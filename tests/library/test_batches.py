"""Minibatches of shuffled epochs, and means over whole data sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glue_jax.batches import batched_mean, minibatch_indices, num_examples


def indices(first_step, num_steps, n=11, batch_size=3, seed=0):
    return np.asarray(minibatch_indices(jax.random.key(seed), first_step, num_steps, n, batch_size))


@pytest.mark.parametrize(("n", "batch_size"), [(11, 3), (5, 5), (7, 1)])
def test_an_epoch_shows_no_example_twice(n, batch_size):
    per_epoch = n // batch_size
    drawn = indices(0, 3 * per_epoch, n, batch_size)
    assert drawn.shape == (3 * per_epoch, batch_size)
    assert drawn.dtype == np.int32
    for epoch in drawn.reshape(3, -1):
        assert len(set(epoch)) == per_epoch * batch_size
        assert set(epoch) <= set(range(n))


def test_epochs_differ_in_order_and_in_what_they_leave_out():
    first, second = indices(0, 6).reshape(2, -1)
    assert not np.array_equal(first, second)
    assert len({tuple(sorted(epoch)) for epoch in indices(0, 60).reshape(20, -1)}) > 1


@pytest.mark.parametrize("num_steps", [1, 3, 7])
@pytest.mark.parametrize("first_step", [0, 1, 2, 3, 8])
def test_a_window_of_steps_may_begin_anywhere(first_step, num_steps):
    np.testing.assert_array_equal(indices(first_step, num_steps), indices(0, 20)[first_step : first_step + num_steps])


def test_the_first_step_may_be_traced():
    traced = jax.jit(lambda first: minibatch_indices(jax.random.key(0), first, 4, 11, 3))
    for first in (0, 2, 7):
        np.testing.assert_array_equal(traced(first), indices(first, 4))


def test_the_key_decides_the_minibatches():
    np.testing.assert_array_equal(indices(0, 5, seed=1), indices(0, 5, seed=1))
    assert not np.array_equal(indices(0, 5, seed=1), indices(0, 5, seed=2))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_the_mean_over_batches_counts_each_example_once(batch_size):
    data = {"x": jnp.arange(7.0) ** 2, "y": jnp.arange(14.0).reshape(7, 2)}
    found = batched_mean(
        lambda scale, batch: {"x": scale * jnp.mean(batch["x"]), "y": jnp.mean(batch["y"])}, 2.0, data, batch_size
    )
    np.testing.assert_allclose(found["x"], 2 * 91 / 7, rtol=1e-6)
    np.testing.assert_allclose(found["y"], 6.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        (jnp.ones(3), 0, "batch_size is 0"),
        ({"x": jnp.ones(3), "y": jnp.ones(4)}, 2, r"data has shapes .*data\['x'\].*\(3,\).*data\['y'\].*\(4,\)"),
        ({}, 2, "data holds no arrays"),
    ],
)
def test_data_and_batch_sizes_that_do_not_fit_are_refused(data, batch_size, message):
    with pytest.raises(ValueError, match=message):
        batched_mean(lambda _, batch: jnp.zeros(()), None, data, batch_size)


def test_the_examples_are_the_leading_axis_that_all_arrays_share():
    assert num_examples("data", {"x": np.ones((5, 2)), "y": [np.ones(5)]}) == 5


@pytest.mark.parametrize("data", [np.float32(1), np.ones((0, 3)), (np.ones(2), np.float32(1))])
def test_data_without_examples_is_refused(data):
    with pytest.raises(ValueError, match=r"data has shapes .*; expected one common leading axis N"):
        num_examples("data", data)


@pytest.mark.parametrize(
    ("first_step", "num_steps", "error", "message"),
    [
        (-3, 2, ValueError, "first_step is -3; expected at least 0"),
        (0.5, 2, TypeError, r"first_step is 0\.5; expected an integer"),
        (None, 2, TypeError, "first_step is None; expected an integer"),
        (0, 2.0, TypeError, r"num_steps is 2\.0; expected an integer"),
        (0, 0, ValueError, "num_steps is 0"),
    ],
)
def test_a_window_that_is_none_is_refused(first_step, num_steps, error, message):
    with pytest.raises(error, match=message):
        indices(first_step, num_steps)


@pytest.mark.parametrize(("first_step", "num_steps", "epochs"), [(0, 3, 1), (1, 2, 1), (2, 2, 2), (0, 7, 3)])
def test_no_epoch_is_permuted_that_the_window_does_not_need(first_step, num_steps, epochs):
    jaxpr = jax.make_jaxpr(lambda: minibatch_indices(jax.random.key(0), first_step, num_steps, 11, 3))()
    assert f"length={epochs}\n" in str(jaxpr)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_a_smaller_batch_in_half_precision_is_averaged_in_float32(dtype, batch_size):
    # Of one batch, of a last smaller one: sums of counts and means that half precision rounds, or overflows.
    data = jnp.array([30000, 30000, 1], dtype)
    found = batched_mean(lambda _, batch: jnp.max(batch), None, data, batch_size)
    large = float(data[0])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (2 * large + 1) / 3 if batch_size == 2 else large, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 3, 4])
@pytest.mark.parametrize("value", [None, {}, jnp.ones(3), (jnp.ones(()), jnp.ones(3))])
def test_what_returns_no_scalars_is_refused(value, batch_size):
    with pytest.raises(ValueError, match=r"fn returned .*; expected a scalar, or a pytree of scalars"):
        batched_mean(lambda _, batch: value, None, jnp.ones(5), batch_size)


def test_python_numbers_are_no_arrays():
    with pytest.raises(TypeError, match=r"data\['x'\]\[0\] is a Python float; expected an array"):
        num_examples("data", {"x": [1.0, 2.0]})


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_minibatches_continue_with_every_kind_of_key(impl):
    key = jax.random.key(0, impl=impl)
    rows = [minibatch_indices(key, step, 1, num_examples=10, batch_size=3)[0].tolist() for step in range(7)]
    assert minibatch_indices(key, 0, 7, num_examples=10, batch_size=3).tolist() == rows
