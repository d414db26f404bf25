"""What `learn` refuses, before any work."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from glue_jax import arguments
from tests.library.helpers import ADAM, DATA, EXPERTS, OPTIMIZER, learn


def never(*args, **words):
    raise AssertionError("work was done before the arguments were checked")


FUNCTIONS = {"loss_fn": never, "step_fn": never, "link_fn": never, "merge_fn": never, "callback": never}
XY = {"x": jnp.ones((50, 3)), "y": jnp.ones(50, jnp.int32)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 51}, "batch_size is 51, but data holds 50 examples"),
        ({"validation_batch_size": 0}, "validation_batch_size is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"validate_every": 0}, "validate_every is 0"),
        ({"steps_per_call": 0}, "steps_per_call is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": 3}, "patience=3 was given without validation_data"),
        ({"data": {"x": jnp.ones(5), "y": jnp.ones(6)}}, r"data has shapes .*\['y'\].*\(6,\)"),
        ({"data": []}, "data holds no arrays"),
        ({"validation_data": (jnp.ones(5), jnp.ones(6))}, r"validation_data has shapes .*\(5,\).*\(6,\)"),
        ({"validation_data": jnp.ones((0, 2))}, "validation_data has shapes"),
        ({"validation_fn": never}, "validation_fn was given without validation_data"),
        ({"experts": {"w": jnp.ones(2), "b": jnp.ones(())}}, r"the experts are not stacked: .*\['b'\]"),
        ({"experts": [{"w": jnp.ones(3), "b": jnp.ones(())}] * 2}, "the experts are not stacked: .*see stack_experts"),
        ({"experts": {}}, "the experts hold no arrays"),
        ({"state": glue_jax.init(2, ADAM)}, r"state\.opt_state is not of this optimizer and beta"),
        (
            {"data": XY, "validation_data": {"x": jnp.ones((9, 3))}},
            r"validation_data differs from data: it has no \['y'\]",
        ),
        (
            {"data": XY, "validation_data": {"x": jnp.ones((9, 4)), "y": jnp.ones(9)}},
            r"at \['x'\]: float32\[N, 4\] against float32\[N, 3\]; at \['y'\]: float32\[N\] against int32\[N\]",
        ),
    ],
)
def test_bad_values_are_refused_before_any_work(words, message):
    with pytest.raises(ValueError, match=message):
        learn(**(FUNCTIONS | words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"max_steps": 2.5}, r"max_steps is 2\.5; expected an integer"),
        ({"max_steps": float("nan")}, "max_steps is nan; expected an integer"),
        ({"max_steps": None}, "max_steps is None; expected an integer"),
        ({"max_steps": jnp.ones(2, int)}, "max_steps is .*; expected an integer"),
        ({"validate_every": "5"}, "validate_every is '5'; expected an integer"),
        ({"batch_size": 16.0}, r"batch_size is 16\.0; expected an integer"),
        ({"patience": 1.5, "validation_data": DATA}, r"patience is 1\.5; expected an integer"),
        (
            {"optimizer": None, "step_fn": glue_jax.spsa_step},
            r"optimizer is None; expected an optax\.GradientTransformation",
        ),
        ({"optimizer": optax.adam}, r"optimizer is <function adam.*for instance optax\.adam\(1e-2\)"),
        ({"key": 0}, r"key is 0; expected one key, for instance jax\.random\.key\(0\)"),
        ({"key": jnp.zeros((2, 2), jnp.uint32)}, "expected one key"),
        ({"callback": 5}, "callback is 5; expected a function"),
        ({"step_fn": None}, "step_fn is None; expected a function"),
        ({"validation_fn": 5, "validation_data": DATA}, "validation_fn is 5; expected a function"),
        ({"state": jnp.zeros(2)}, "state is a ArrayImpl; expected a GlueState"),
        (
            {"data": {"y": np.array(["a"] * 50)}},
            r"data\['y'\] is a ndarray with dtype <U1; expected an array of numbers",
        ),
        ({"data": "text"}, "data is a Python str; expected an array"),
    ],
)
def test_bad_types_are_refused_before_any_work(words, message):
    with pytest.raises(TypeError, match=message):
        learn(**(FUNCTIONS | words))


def test_data_in_python_lists_is_refused_without_printing_it():
    with pytest.raises(TypeError, match=r"data\['x'\]\[0\]\[0\] is a Python float; expected an array") as caught:
        learn(data={"x": np.ones((1000, 10)).tolist()})
    assert len(str(caught.value)) < 200


def test_many_leaves_of_different_lengths_are_refused_with_the_difference_in_a_short_message():
    data = {f"leaf{index:03}": jnp.ones(50) for index in range(500)} | {"last": jnp.ones(51)}
    with pytest.raises(ValueError, match=r"'last'.*\(51,\).*and 49\d more") as caught:
        learn(data=data)
    assert len(str(caught.value)) < 500


def test_experts_in_a_list_that_cannot_be_told_from_layers_are_named_where_the_loss_fails():
    with pytest.raises(TypeError, match="list indices") as caught:
        learn(experts=[{"w": jnp.ones(2)}, {"w": jnp.ones(2)}])
    assert "use stack_experts(experts)" in caught.value.__notes__[-1]


@pytest.mark.parametrize("hidden", ["link_fn", "merge_fn", "loss_fn", "optimizer"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, functools.partial], ids=["partial", "jit", "partial of one"])
def test_a_function_that_a_partial_hides_is_refused(hidden, wrap):
    step_fn = wrap(functools.partial(glue_jax.spsa_step, **{hidden: never}))
    with pytest.raises(ValueError, match=f"holds {hidden}, which learn would overwrite: pass {hidden}= to learn"):
        learn(step_fn=step_fn)


def test_the_other_words_of_a_partial_are_the_steps_own():
    step_fn = functools.partial(functools.partial(glue_jax.spsa_step, radius=0.1), num_directions=2)
    probe_losses = learn(step_fn=step_fn).history.metrics.probe_losses
    assert probe_losses is not None
    assert probe_losses.shape == (20, 2, 2)


def test_old_keys_are_keys():
    assert int(learn(key=jax.random.PRNGKey(0)).state.step) == 20


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax.jit(lambda experts: learn(experts=experts).alpha)(EXPERTS),
        lambda: jax.vmap(lambda key: learn(key=key).alpha)(jax.random.split(jax.random.key(0), 2)),
        lambda: jax.jit(lambda data: learn(data=data).alpha)(DATA),
    ],
)
def test_a_call_under_a_transformation_is_refused(call):
    with pytest.raises(TypeError, match="learn was called under jit, vmap or another transformation"):
        call()


def test_a_validation_function_of_its_own_may_want_other_data():
    result = learn(validation_data={"other": jnp.ones((9, 2), jnp.int32)}, validation_fn=lambda p, b: p["w"])
    assert len(result.history.validation_values) == 5


def test_the_defaults_are_those_that_are_not_taken_for_given():
    defaults = {name: parameter.default for name, parameter in inspect.signature(glue_jax.learn).parameters.items()}
    assert (defaults["batch_size"], defaults["patience"]) == (arguments.BATCH_SIZE, arguments.PATIENCE)
    assert int(learn(patience=arguments.PATIENCE).state.step) == 20
    assert int(learn(patience=None, optimizer=OPTIMIZER).state.step) == 20
