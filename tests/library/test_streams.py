"""Data as arrays, an iterator of batches, or a loader."""

import functools
import itertools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from glue_jax.streams import ArrayBatches, is_stream
from tests.helpers import compilations
from tests.library.helpers import ADAM, DATA, STEPS, Loader, Tensor, learn, squared

KEY = jax.random.key(3)
learn = functools.partial(learn, key=KEY, batch_size=64, loss_fn=squared, optimizer=ADAM)


def batches_of_arrays(steps, data=DATA, batch_size=8):
    """The minibatches that `learn` takes of arrays, by what its docstring says."""
    rows = glue_jax.batches.minibatch_indices(jax.random.fold_in(KEY, 0), 0, steps, len(data), batch_size)
    return [np.asarray(data)[np.asarray(indices)] for indices in rows]


@pytest.mark.parametrize("step_fn", STEPS)
@pytest.mark.parametrize("as_data", [iter, Loader, lambda batches: (Tensor(batch) for batch in batches)])
def test_batches_in_the_order_of_the_arrays_give_bit_for_bit_the_same(step_fn, as_data):
    words = {"step_fn": step_fn, "validation_data": DATA, "validation_batch_size": 7}
    whole = learn(data=DATA, **(words | {"batch_size": 8}))
    chex.assert_trees_all_equal(learn(data=as_data(batches_of_arrays(20)), **words), whole)


def test_arrays_of_numpy_are_those_of_jax():
    chex.assert_trees_all_equal(learn(data=np.asarray(DATA), batch_size=8), learn(data=DATA, batch_size=8))


def test_no_batch_is_taken_that_is_not_used_and_a_later_call_goes_on():
    batches = batches_of_arrays(20)
    stream = (batch for batch in [*batches, batches[0]])
    part = learn(data=stream, max_steps=7, validation_data=DATA)
    rest = learn(data=stream, max_steps=13, validation_data=DATA, state=part)
    assert len(list(stream)) == 1
    chex.assert_trees_all_equal(rest, learn(data=iter(batches), validation_data=DATA))


@pytest.mark.parametrize("count", [5, 7, 10])
def test_an_iterator_that_ends_before_the_last_step_ends_the_run(count):
    batches, told = batches_of_arrays(count), []
    result = learn(data=iter(batches), validation_data=DATA, callback=told.append)
    chex.assert_trees_all_equal(result, learn(data=iter(batches), validation_data=DATA, max_steps=count))
    assert result.history.validation_steps[-1] == count == told[-1].step


@pytest.mark.parametrize("empty", [iter([]), Loader([])])
def test_data_without_a_batch_is_an_error(empty):
    with pytest.raises(ValueError, match="gave no batch"):
        learn(data=empty)


def test_a_loader_is_iterated_anew_each_epoch():
    loader = Loader(batches_of_arrays(6))
    result = learn(data=loader, max_steps=20)
    assert (loader.epochs, loader.given) == (4, 20)
    chex.assert_trees_all_equal(result, learn(data=itertools.cycle(loader.batches), max_steps=20))


def test_an_endless_loader_is_data():
    class Endless:
        def __len__(self):
            return sys.maxsize

        def __getitem__(self, index):
            return DATA[:8]

        def __iter__(self):
            return itertools.repeat(DATA[:8])

    assert int(learn(data=Endless()).state.step) == 20
    with pytest.raises(ValueError, match="validation_data is a Endless without end"):
        learn(data=DATA, batch_size=8, validation_data=Endless())


def test_batches_of_one_shape_are_one_program(caplog):
    words = {"loss_fn": lambda params, batch: squared(params, batch), "validation_data": Loader([DATA[:8], DATA[8:16]])}
    with compilations(caplog) as names:
        learn(data=iter(batches_of_arrays(20)), **words)
    assert [names.count(f"jit({name})") for name in ("_run_step", "_value", "_merged")] == [1, 1, 1]


def test_batches_need_no_common_leading_axis():
    def loss(params, batch):
        return params["w"] * batch["scale"] + jnp.mean(batch["x"])

    result = learn(data=iter([{"scale": 2.0, "x": DATA[:4]}, {"scale": 3.0, "x": DATA[:4]}]), loss_fn=loss)
    assert int(result.state.step) == 2


def test_validation_by_an_iterator_is_refused():
    with pytest.raises(TypeError, match=r"validation_data is an iterator \(list_iterator\), which can be read once"):
        learn(data=DATA, batch_size=8, validation_data=iter([DATA]))


def test_validation_by_a_loader_without_batches_is_refused():
    with pytest.raises(ValueError, match="validation_data, a Loader, gave no batch"):
        learn(data=DATA, batch_size=8, validation_data=Loader([]))


@pytest.mark.parametrize(
    ("words", "message"),
    [({"batch_size": 16}, "batch_size is 16, but data is a"), ({"steps_per_call": 2}, "expected None or 1")],
)
def test_what_a_stream_decides_is_not_given_beside_it(words, message):
    with pytest.raises(ValueError, match=message):
        learn(data=iter([DATA]), **words)


@pytest.mark.parametrize("leaf", [np.array(["a"]), "text", object()])
def test_a_batch_that_holds_no_numbers_is_refused_by_its_path(leaf):
    with pytest.raises(TypeError, match=r"a batch of data\['x'\] is a .* with dtype"):
        learn(data=iter([{"x": leaf}]))


@pytest.mark.parametrize("data", [DATA, {"x": DATA}, (DATA,), [DATA], Tensor(DATA), "text", None])
def test_pytrees_of_arrays_are_no_streams(data):
    assert not is_stream(data)


def test_the_minibatches_of_arrays_are_those_of_minibatch_indices_from_any_step():
    source = ArrayBatches(KEY, DATA, 8)
    expected = np.asarray(glue_jax.batches.minibatch_indices(KEY, 0, 40, 50, 8))
    for first, count in ((0, 40), (5, 1), (5, 2), (11, 13), (0, 3)):
        np.testing.assert_array_equal(source.rows(first, count), expected[first : first + count])
