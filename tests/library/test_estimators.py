"""Gradient estimators: exact where they must be, and right on average elsewhere."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose, assert_array_less

from glue_jax import theory
from glue_jax.directions import DirectionName, dimension, sample_directions
from glue_jax.estimators import Scale, forward_gradient, full_gradient, spsa_gradient

NAMES = get_args(DirectionName)
SCALES = get_args(Scale)
SAMPLES = 4000

spsa_and_forward = pytest.mark.parametrize("estimator", [spsa_gradient, forward_gradient])
all_estimators = pytest.mark.parametrize("estimator", [spsa_gradient, forward_gradient, full_gradient])


def inner(tree_a, tree_b):
    """The inner product of two pytrees."""
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), tree_a, tree_b)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


@functools.cache
def sampled(name, m, shape):
    """The gradient at zero of a random linear function `[...]`, and its estimates `[SAMPLES, ...]` by scale."""
    gradient = np.random.default_rng(len(shape) * m + shape[-1]).normal(size=shape)

    def estimates(key):
        return {
            scale: spsa_gradient(
                jax.random.clone(key),
                functools.partial(inner, jnp.asarray(gradient, jnp.float32)),
                jnp.zeros(shape),
                radius=0.5,
                num_directions=m,
                directions=name,
                scale=scale,
                probe_batch_size=2 * m,
            ).gradient
            for scale in SCALES
        }

    return gradient, jax.device_get(jax.jit(jax.vmap(estimates))(jax.random.split(jax.random.key(1), SAMPLES)))


def assert_mean_is(samples, expected, rounding):
    """5 standard errors of the sample, and float32's rounding."""
    samples = np.asarray(samples, np.float64)
    tolerance = 5 * samples.std(axis=0) / np.sqrt(len(samples)) + rounding
    assert_array_less(np.abs(samples.mean(axis=0) - expected), np.broadcast_to(tolerance, expected.shape))


CASES = [(name, (k,), m) for name in NAMES for k in (2, 5, 10) for m in sorted({1, 3, k - 1})]
CASES += [("rademacher", (2, 4), 3), ("orthogonal", (2, 4), 3), ("simplex_orthogonal", (2, 4), 3)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "shape", "m"), CASES)
def test_the_mean_and_the_mean_squared_error_are_those_of_theory(name, shape, m, scale):
    gradient, estimates = sampled(name, m, shape)
    norm = np.linalg.norm(gradient)
    assert_mean_is(estimates[scale], theory.estimator_mean(gradient, name, scale=scale), 1e-5 * norm)
    errors = np.sum((estimates[scale] - gradient).reshape(SAMPLES, -1) ** 2, axis=1)
    expected = np.asarray(theory.estimator_mean_squared_error(gradient, m, name, scale=scale))
    assert_mean_is(errors, expected, 1e-5 * norm**2)


@pytest.mark.parametrize("name", NAMES)
def test_theory_holds_on_a_quadratic_function_at_any_radius(name):
    # Central differences are exact on a quadratic function: H beta + g is the gradient.
    rng = np.random.default_rng(0)
    root, g, beta = rng.normal(size=(4, 4)), rng.normal(size=4), rng.normal(size=4)
    hessian = root @ root.T
    gradient = hessian @ beta + g

    def fun(b):
        return 0.5 * b @ jnp.asarray(hessian, jnp.float32) @ b + jnp.asarray(g, jnp.float32) @ b

    def estimate(key):
        at = jnp.asarray(beta, jnp.float32)
        return spsa_gradient(key, fun, at, radius=0.7, num_directions=2, directions=name).gradient

    estimates = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(2), SAMPLES)))
    norm = np.linalg.norm(gradient)
    assert_mean_is(estimates, theory.estimator_mean(gradient, name), 1e-4 * norm)
    expected = np.asarray(theory.estimator_mean_squared_error(gradient, 2, name))
    assert_mean_is(np.sum((estimates - gradient) ** 2, axis=1), expected, 1e-4 * norm**2)


@pytest.mark.parametrize("name", NAMES)
def test_theory_holds_over_a_tree_of_coefficients_with_a_scalar(name):
    rng = np.random.default_rng(3)
    gradient = {"a": rng.normal(size=4), "t": np.asarray(rng.normal()), "w": rng.normal(size=(2, 3))}
    beta = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), gradient)
    fun = functools.partial(inner, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), gradient))

    def flat_estimate(key):
        estimate = spsa_gradient(key, fun, beta, radius=0.5, num_directions=3, directions=name)
        return ravel_pytree(estimate.gradient)[0]

    estimates = np.asarray(jax.jit(jax.vmap(flat_estimate))(jax.random.split(jax.random.key(3), SAMPLES)))
    # Under simplex_orthogonal each row loses its mean, and a scalar is a dimension of its own.
    projected, d = gradient, 4 + 1 + 6
    if name == "simplex_orthogonal":
        projected = {what: g - g.mean(axis=-1, keepdims=True) if g.ndim else g for what, g in gradient.items()}
        d = 3 + 1 + 4
    assert dimension(beta, name) == d
    flat = np.concatenate([np.ravel(g) for g in gradient.values()])
    mean = np.concatenate([np.ravel(g) for g in projected.values()])
    assert_mean_is(estimates, mean, 1e-5 * np.linalg.norm(flat))
    error = np.sum((mean - flat) ** 2) + theory.relative_variance(d, 3, name) * np.sum(mean**2)
    assert_mean_is(np.sum((estimates - flat) ** 2, axis=1), np.asarray(error), 1e-4 * np.sum(flat**2))


@pytest.mark.parametrize(
    ("name", "shape", "m"),
    [("orthogonal", *case) for case in (((5,), 5), ((5,), 10), ((2, 3), 6))]
    + [("simplex_orthogonal", *case) for case in (((5,), 4), ((5,), 8), ((2, 4), 6))],
)
def test_whole_blocks_give_the_exact_gradient_of_a_linear_function_or_its_zero_sum_part(name, shape, m):
    gradient, estimates = sampled(name, m, shape)
    if name == "orthogonal":
        assert theory.estimator_mean_squared_error(gradient, m, name) == 0
    else:
        gradient = gradient - gradient.mean(axis=-1, keepdims=True)
    assert_allclose(estimates["unbiased"], np.broadcast_to(gradient, (SAMPLES, *shape)), atol=1e-4)


@pytest.mark.parametrize(("name", "m"), [("simplex_orthogonal", 5), ("orthogonal", 6)])
def test_halving_the_radius_quarters_the_error_on_a_nonlinear_function(name, m):
    with jax.enable_x64(True):
        frequency, beta = np.linspace(0.5, 1.5, 6), np.linspace(-1.0, 1.0, 6)
        gradient = np.exp(np.sin(frequency * beta).sum()) * frequency * np.cos(frequency * beta)
        if name == "simplex_orthogonal":
            gradient -= gradient.mean()

        @jax.jit
        def error(radius):
            estimate = spsa_gradient(
                jax.random.key(4),
                lambda b: jnp.exp(jnp.sum(jnp.sin(frequency * b))),
                jnp.asarray(beta),
                radius=radius,
                num_directions=m,
                directions=name,
            )
            assert estimate.gradient.dtype == jnp.float64
            return jnp.linalg.norm(estimate.gradient - gradient)

        errors = np.array([error(radius) for radius in (0.08, 0.04, 0.02, 0.01)])
    # The next term of the expansion is a radius² part of the error.
    assert_allclose(errors[:-1] / errors[1:], 4, rtol=0.01)
    assert errors[-1] < 1e-3 * np.linalg.norm(gradient)


def test_spsa_takes_a_function_that_jax_cannot_see_into():
    def served(beta):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda b: np.float32(np.sum(b**2)), shape, beta, vmap_method="sequential")

    beta = jnp.array([1.0, -2.0])
    estimate = spsa_gradient(jax.random.key(0), served, beta, radius=0.1, num_directions=2, directions="orthogonal")
    assert_allclose(estimate.gradient, [2.0, -4.0], rtol=1e-4)


@pytest.mark.parametrize(("scale", "factor"), [("unbiased", 3), ("paper", 1)])
def test_the_estimate_is_equation_6_along_the_directions_of_the_key(scale, factor):
    key, beta, g = jax.random.key(5), np.array([0.1, 0.2, 0.3], np.float32), np.array([1.0, -2.0, 4.0], np.float32)
    u = np.asarray(sample_directions(jax.random.clone(key), beta, 2, "sphere"))
    estimate = spsa_gradient(
        key, lambda b: b @ g, beta, radius=0.25, num_directions=2, directions="sphere", scale=scale
    )
    assert estimate.probe_values is not None
    assert_allclose(estimate.probe_values, np.stack([(beta + 0.25 * u) @ g, (beta - 0.25 * u) @ g], axis=1), atol=1e-5)
    assert_allclose(estimate.gradient, factor * np.mean((u @ g)[:, None] * u, axis=0), atol=1e-4)
    assert_allclose(estimate.value, beta @ g, rtol=1e-5)


@pytest.mark.parametrize(("name", "scale"), [*[(name, "unbiased") for name in NAMES], ("rademacher", "paper")])
def test_forward_gradient_is_spsa_in_the_limit_of_radius_zero(name, scale):
    # On a quadratic function any radius is that limit.
    beta = jnp.array([[0.5, -1.0, 2.0], [0.0, 1.0, 1.5]])
    words = {"num_directions": 2, "directions": name, "scale": scale}

    @jax.jit
    def estimates(beta):
        spsa = spsa_gradient(jax.random.key(6), lambda b: jnp.sum(b**2), beta, radius=0.5, **words)
        return spsa, forward_gradient(jax.random.key(6), lambda b: jnp.sum(b**2), beta, **words)

    spsa, forward = estimates(beta)
    assert_allclose(spsa.gradient, forward.gradient, atol=1e-4)
    assert_allclose(forward.value, 8.5, rtol=1e-6)
    assert forward.probe_values is None


def test_the_full_gradient_is_exact_and_takes_any_key():
    for key in (None, jax.random.key(0)):
        estimate = full_gradient(key, lambda b: b["x"] ** 3 + 2 * b["y"], {"x": 2.0, "y": 5.0})
        assert jax.tree.map(float, estimate.gradient) == {"x": 12.0, "y": 2.0}
        assert float(estimate.value) == 18.0
        assert estimate.probe_values is None


@spsa_and_forward
@pytest.mark.parametrize("probe_batch_size", [1, 4])
def test_how_many_probes_run_together_does_not_change_the_estimate(estimator, probe_batch_size):
    beta = {"a": jnp.array([0.3, 0.1, -0.4]), "t": jnp.array(0.5)}

    def fun(b):
        return jnp.sum(jnp.cos(b["a"])) * b["t"]

    @jax.jit
    def estimates(beta):
        some = estimator(jax.random.key(7), fun, beta, num_directions=3, probe_batch_size=probe_batch_size)
        return estimator(jax.random.key(7), fun, beta, num_directions=3), some

    whole, some = estimates(beta)
    # Slopes of SPSA are differences of values around 1, rounded to 1e-7, over twice the radius 1e-2.
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-4), some, whole)


@all_estimators
def test_estimates_have_the_structure_and_dtypes_of_beta_and_a_float32_value(estimator):
    beta = {"a": jnp.ones(3, jnp.bfloat16), "t": jnp.ones(())}

    def fun(b):
        return (jnp.sum(b["a"]) * b["t"].astype(jnp.bfloat16)).astype(jnp.bfloat16)

    estimate = estimator(jax.random.key(0), fun, beta)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), estimate.gradient) == {
        "a": ((3,), "bfloat16"),
        "t": ((), "float32"),
    }
    assert estimate.value.shape == ()
    assert estimate.value.dtype == jnp.float32


def test_the_radius_may_be_traced():
    def estimate(radius):
        return spsa_gradient(jax.random.key(0), lambda b: jnp.sum(b**3), jnp.ones(3), radius=radius).gradient

    assert_allclose(jax.jit(estimate)(0.1), estimate(0.1), rtol=1e-4)


@pytest.mark.parametrize("radius", [0, 0.0, -1e-2, float("nan"), float("inf")])
def test_a_radius_that_is_not_above_zero_and_finite_is_refused(radius):
    with pytest.raises(ValueError, match=f"radius is {radius}"):
        spsa_gradient(jax.random.key(0), jnp.sum, jnp.zeros(3), radius=radius)


@spsa_and_forward
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_directions": 0}, "num_directions is 0"),
        ({"directions": "axes"}, "directions is 'axes'"),
        ({"scale": "Paper"}, "scale is 'Paper'; expected one of .*unbiased"),
        ({"probe_batch_size": 0, "num_directions": 2}, "probe_batch_size is 0"),
    ],
)
def test_arguments_out_of_their_range_are_refused(estimator, words, message):
    with pytest.raises(ValueError, match=message):
        estimator(jax.random.key(0), jnp.sum, jnp.zeros(3), **words)


@all_estimators
@pytest.mark.parametrize(
    "fun",
    [
        lambda b: b,
        lambda b: jnp.sum(b)[None],
        lambda b: jnp.sum(b) + 1j,
        lambda b: (jnp.sum(b), {"accuracy": jnp.sum(b)}),
        lambda b: (jnp.sum(b), b),
        lambda b: {"loss": jnp.sum(b)},
    ],
    ids=["a vector", "shape [1]", "complex", "a scalar and a dict", "a scalar and a vector", "a dict"],
)
def test_a_function_whose_value_is_no_real_scalar_is_refused(estimator, fun):
    with pytest.raises(ValueError, match=r"the function of the coefficients returned .*expected one real scalar"):
        estimator(jax.random.key(0), fun, jnp.zeros(3))


@all_estimators
def test_coefficients_that_are_not_floating_point_are_refused_by_path(estimator):
    with pytest.raises(TypeError, match=r"beta\['n'\] has dtype int32"):
        estimator(jax.random.key(0), lambda b: jnp.sum(b["w"]), {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)})
