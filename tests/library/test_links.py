"""Links beside the softmax: boxes, task vectors, a temperature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from tests.library.helpers import STEPS


def learned(step_fn, experts, loss, beta, steps=80, rate=0.1, **words):
    """The state and the last metrics of some steps on a batch that makes no difference."""
    optimizer = optax.adam(rate)
    if step_fn is not glue_jax.full_gradient_step:
        words |= {"directions": "orthogonal", "num_directions": sum(leaf.size for leaf in jax.tree.leaves(beta))}
    step = jax.jit(
        functools.partial(step_fn, loss_fn=lambda p, b: loss(p) + 0 * jnp.sum(b), optimizer=optimizer, **words)
    )
    state, metrics = glue_jax.init(2, optimizer, beta=beta), None
    for _ in range(steps):
        state, metrics = step(jax.random.key(0), state, experts, jnp.zeros(1))
    return state, metrics


def test_a_box_keeps_its_bounds_and_starts_in_its_middle():
    values = glue_jax.links.box(low=-0.5, high=1.5)(jnp.array([-1e3, 0.0, 1e3]))
    np.testing.assert_allclose(values, [-0.5, 0.5, 1.5], atol=1e-6)
    with pytest.raises(ValueError, match=r"low is 1.0 and high is 1.0; expected finite numbers, low < high"):
        glue_jax.links.box(low=1.0, high=1.0)
    with pytest.raises(ValueError, match="expected finite numbers"):
        glue_jax.links.box(high=np.inf)
    with pytest.raises(ValueError, match=r"low has shape \(3,\); expected one real number"):
        glue_jax.links.box(low=jnp.zeros(3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("temperature", [jnp.full(2, 2.0), 0.0])
def test_a_temperature_that_is_no_number_above_0_is_refused(temperature):
    merge = glue_jax.links.tempered_merge(glue_jax.blend, head="w")
    with pytest.raises(ValueError, match="the temperature"):
        merge({"w": jnp.ones((2, 2))}, glue_jax.links.Tempered(jnp.ones(2) / 2, temperature))


def test_links_that_return_nothing_and_betas_that_are_not_theirs_are_refused():
    state = glue_jax.init(2, optax.sgd(0.1))
    with pytest.raises(TypeError, match="link_fn returned None; expected coefficients"):
        glue_jax.ask(jax.random.key(0), state, link_fn=lambda beta: None)
    tempered = glue_jax.init(2, optax.sgd(0.1), link_fn=glue_jax.links.tempered_link())
    with pytest.raises(TypeError, match="beta is a Tempered; the softmax takes one array"):
        glue_jax.alpha(tempered)
    with pytest.raises(TypeError, match="state is a list; expected a GlueState or a LearnResult"):
        glue_jax.alpha([0.0, 0.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="state has 2 directions, but beta has 1 under this link_fn"):
        glue_jax.alpha(glue_jax.init(2, link_fn=glue_jax.unconstrained))


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        (jax.nn.softmax, 0.25),
        (glue_jax.unconstrained, 0.25),
        (glue_jax.links.box(low=-1.0, high=2.0), 0.25),
        (glue_jax.links.box(low=0.5, high=1.5), 1.0),
    ],
)
def test_a_link_brings_its_own_start(link, expected):
    state = glue_jax.init(4, optax.sgd(0.1), link_fn=link)
    np.testing.assert_allclose(glue_jax.alpha(state, link), np.full(4, expected), rtol=1e-5)
    tempered = glue_jax.links.tempered_link(link)
    alpha = glue_jax.alpha(glue_jax.init(4, optax.sgd(0.1), link_fn=tempered), tempered)
    np.testing.assert_allclose(alpha.coefficients, np.full(4, expected), rtol=1e-5)
    assert alpha.temperature == 1


def test_links_of_the_same_parts_are_equal_so_that_nothing_is_compiled_twice():
    assert glue_jax.links.tempered_link() == glue_jax.links.tempered_link()
    assert glue_jax.links.box(low=-1.0) is glue_jax.links.box(low=-1.0)
    assert glue_jax.links.tempered_link(glue_jax.unconstrained) != glue_jax.links.tempered_link()


def test_coefficients_without_their_temperature_are_refused():
    with pytest.raises(TypeError, match=r"beta is a .*; expected glue_jax.links.Tempered"):
        glue_jax.links.tempered_link()(jnp.zeros(2))
    with pytest.raises(TypeError, match=r"alpha is a .*; expected glue_jax.links.Tempered"):
        glue_jax.links.tempered_merge(glue_jax.blend, head="w")({"w": jnp.ones(2)}, jnp.ones(2))


def test_task_vector_weights_are_the_origin_and_its_differences():
    origin, first, second = (jnp.array(values) for values in ([1.0, 2.0], [2.0, 2.0], [1.0, 5.0]))
    scales = jnp.array([0.5, -2.0])
    merged = glue_jax.blend(glue_jax.stack_experts([origin, first, second]), glue_jax.links.task_vector_weights(scales))
    np.testing.assert_allclose(merged, origin + 0.5 * (first - origin) - 2 * (second - origin), rtol=1e-6)
    rows = glue_jax.links.task_vector_weights(jnp.stack([scales, jnp.zeros(2)]))
    np.testing.assert_allclose(rows, [[2.5, 0.5, -2], [1, 0, 0]])


@pytest.mark.parametrize("step_fn", STEPS)
def test_a_point_outside_the_hull_is_reached_by_task_vectors_in_a_box(step_fn):
    # The origin is 0, the task vectors are the axes, and the best point has a negative part.
    experts = glue_jax.stack_experts([jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])])

    def link(beta):
        return glue_jax.links.task_vector_weights(glue_jax.links.box(low=-1.0, high=2.0)(beta))

    def loss(params):
        return jnp.sum(jnp.square(params - jnp.array([1.5, -0.5])))

    state, _ = learned(step_fn, experts, loss, jnp.zeros(2), link_fn=link)
    np.testing.assert_allclose(glue_jax.alpha(state, link), [0.0, 1.5, -0.5], atol=0.05)


def model(value):
    return {"body": jnp.full((3, 3), value), "head": {"kernel": jnp.full((3, 2), value), "bias": jnp.full(2, value)}}


def test_a_temperature_divides_the_heads_parameters_and_no_others():
    experts = glue_jax.stack_experts([model(0.0), model(1.0)])
    merge = glue_jax.links.tempered_merge(glue_jax.blend, head="^head/")
    merged = merge(experts, glue_jax.links.Tempered(jnp.array([0.5, 0.5]), jnp.array(0.25)))
    np.testing.assert_allclose(merged["head"]["kernel"], 2.0)
    np.testing.assert_allclose(merged["head"]["bias"], 2.0)
    np.testing.assert_allclose(merged["body"], 0.5)
    with pytest.raises(ValueError, match="the pattern 'tail' matches no path"):
        glue_jax.links.tempered_merge(glue_jax.blend, head="tail")(
            experts, glue_jax.links.Tempered(jnp.ones(2) / 2, jnp.ones(()))
        )


@pytest.mark.parametrize("step_fn", STEPS)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_temperature_is_learned_beside_the_coefficients(step_fn, grouped):
    # Of the second expert's direction, but logits twice as large.
    experts = glue_jax.stack_experts([{"head": jnp.array([1.0, 0.0])}, {"head": jnp.array([0.0, 1.0])}])
    blend, coefficients = glue_jax.blend, jnp.zeros(2)
    if grouped:
        groups = glue_jax.merging.group_by_path(experts, "head")
        blend, coefficients = functools.partial(blend, groups=groups.rows), jnp.zeros((1, 2))
    link = glue_jax.links.tempered_link()
    state, metrics = learned(
        step_fn,
        experts,
        lambda params: jnp.sum(jnp.square(params["head"] - jnp.array([0.5, 1.5]))),
        glue_jax.links.Tempered(coefficients, jnp.zeros(())),
        link_fn=link,
        merge_fn=glue_jax.links.tempered_merge(blend, head="head"),
    )
    alpha = glue_jax.alpha(state, link)
    np.testing.assert_allclose(
        alpha.coefficients, jnp.broadcast_to(jnp.array([0.25, 0.75]), coefficients.shape), atol=0.03
    )
    np.testing.assert_allclose(alpha.temperature, 0.5, atol=0.03)
    # Reported with the coefficients.
    assert metrics is not None
    assert metrics.alpha.temperature.shape == ()


def test_the_directions_of_a_softmax_over_another_axis_are_not_zero_sum_over_the_experts():
    over_rows = functools.partial(jax.nn.softmax, axis=0)
    experts, start = {"w": jnp.arange(2.0)}, glue_jax.init(2, optax.sgd(1.0), beta=jnp.zeros((2, 2)))
    step = functools.partial(
        glue_jax.spsa_step,
        loss_fn=lambda params, _: params["w"],
        optimizer=optax.sgd(1.0),
        link_fn=over_rows,
        merge_fn=lambda experts, alpha: {"w": alpha[0] @ experts["w"]},
        num_directions=4,
    )
    after, _ = step(jax.random.key(0), start, experts, None)
    # alpha[0, 1] falls with beta[0, 1] and rises with beta[1, 1], a direction that is not zero-sum over the experts.
    np.testing.assert_allclose(after.beta, [[0, -0.25], [0, 0.25]], atol=2e-3)


@pytest.mark.parametrize(
    ("link", "radius"),
    [
        (jax.nn.softmax, 0.1),
        (functools.partial(jax.nn.softmax, axis=-1), 0.1),
        (glue_jax.links.tempered_link(), 0.1),
        (glue_jax.unconstrained, 0.01),
        (glue_jax.links.tempered_link(glue_jax.unconstrained), 0.01),
        (lambda beta: beta + 0.25, 0.01),
    ],
)
def test_a_link_brings_its_own_radius(link, radius):
    # Alpha itself moves ten times as far as under a softmax of ten experts.
    state = glue_jax.init(4, optax.sgd(0.1), link_fn=link)
    assert glue_jax.ask(jax.random.key(0), state, link_fn=link).radius == radius
