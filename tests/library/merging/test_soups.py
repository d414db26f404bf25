"""Baselines: weights from losses, soups, Fisher-weighted averages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from glue_jax.merging import best_expert, diagonal_fisher, fisher_merge, greedy_soup, loss_weights


def test_loss_weights_are_a_softmax_of_negative_losses():
    losses = np.log([1.0, 2.0, 4.0])
    np.testing.assert_allclose(loss_weights(losses), np.array([4, 2, 1]) / 7, rtol=1e-6)
    np.testing.assert_allclose(loss_weights(losses, temperature=0.5), np.array([16, 4, 1]) / 21, rtol=1e-6)
    np.testing.assert_allclose(loss_weights(losses, temperature=1e6), [1 / 3] * 3, rtol=1e-5)


def test_the_best_expert_has_the_lowest_loss():
    np.testing.assert_array_equal(best_expert([2.0, 1.0, 3.0]), [0, 1, 0])


@pytest.mark.parametrize("permutation", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_a_greedy_soup_keeps_what_does_no_harm_best_first(permutation):
    # Distances to 1: the best alone 0.1; with the second (1.1 + 0.8) / 2 = 0.95; the third makes it worse; with the
    # fourth (1.1 + 0.8 + 1.4) / 3 = 1.1 it is worse, too.
    values = np.array([1.1, 0.8, 1.3, 1.4])[permutation]
    experts = glue_jax.stack_experts([{"w": jnp.array(value, jnp.float32)} for value in values])
    asked = []

    def loss(params):
        asked.append(float(params["w"]))
        return jnp.abs(params["w"] - 1)

    alpha = greedy_soup(experts, np.abs(values - 1), loss)
    np.testing.assert_allclose(alpha, np.array([0.5, 0.5, 0, 0])[permutation])
    np.testing.assert_allclose(asked, [1.1, 0.95, 3.2 / 3, 1.1], rtol=1e-6)


def test_a_soup_is_judged_by_one_metric_alone():
    # Cross-entropies give the order; of error rates the first expert's is the only one at 0.
    experts = glue_jax.stack_experts([{"w": jnp.array(value)} for value in (0.0, 1.0, 2.0)])
    alpha = greedy_soup(experts, [2.3, 2.4, 2.5], lambda params: jnp.minimum(params["w"], 0.9))
    np.testing.assert_array_equal(alpha, [1, 0, 0])


def test_a_soup_of_equal_experts_keeps_all():
    experts = glue_jax.stack_experts([{"w": jnp.ones(2)}] * 3)
    np.testing.assert_allclose(greedy_soup(experts, [1.0, 1.0, 1.0], lambda params: 1.0), [1 / 3] * 3)


def test_fisher_weights_are_of_each_parameter():
    experts = glue_jax.stack_experts([{"w": jnp.array([0.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}])
    fishers = {"w": jnp.array([[1.0, 3.0], [3.0, 1.0]])}
    merged = fisher_merge(experts, fishers, glue_jax.coefficients.uniform(2))
    np.testing.assert_allclose(merged["w"], [0.75, 0.25], rtol=1e-6)
    merged = fisher_merge(experts, fishers, jnp.array([0.75, 0.25]))
    np.testing.assert_allclose(merged["w"], [0.5, 0.1], rtol=1e-6)


def test_without_fisher_information_it_is_the_blend():
    experts = glue_jax.stack_experts([{"w": jnp.array([2.0, 4.0])}, {"w": jnp.array([4.0, 0.0])}])
    alpha = jnp.array([0.25, 0.75])
    merged = fisher_merge(experts, jax.tree.map(jnp.zeros_like, experts), alpha)
    np.testing.assert_allclose(merged["w"], glue_jax.blend(experts, alpha)["w"], rtol=1e-6)


def test_leaves_that_are_not_floating_point_have_no_fisher_information():
    def logits(params, inputs):
        return inputs @ params["w"] + params["steps"]

    model = {"w": jnp.eye(3), "steps": jnp.array(27)}
    fisher = jax.jit(functools.partial(diagonal_fisher, logits))(model, jnp.ones((4, 3)))
    assert float(fisher["steps"]) == 0
    assert (fisher["w"] > 0).all()
    merged = fisher_merge(
        glue_jax.stack_experts([model] * 3), glue_jax.stack_experts([fisher] * 3), jnp.array([0.2, 0.5, 0.3])
    )
    assert int(merged["steps"]) == 27
    np.testing.assert_allclose(merged["w"], jnp.eye(3), atol=1e-6)


def test_fisher_information_of_other_shapes_is_refused():
    experts = {"w": jnp.ones((2, 3))}
    for shape in ((2, 1), (2, 4)):
        with pytest.raises(
            ValueError, match="fishers do not fit; expected the structure and the shapes of the experts"
        ):
            fisher_merge(experts, {"w": jnp.ones(shape)}, glue_jax.coefficients.uniform(2))
    with pytest.raises(ValueError, match="epsilon is 0"):
        fisher_merge(experts, experts, glue_jax.coefficients.uniform(2), epsilon=0)


def test_the_fisher_information_of_a_linear_classifier_by_hand():
    # log p(y) has gradient x (e_y - p) for the kernel: its square's expectation is x^2 p (1 - p) in two classes.
    x = jax.random.normal(jax.random.key(0), (7, 3))
    params = {"kernel": jax.random.normal(jax.random.key(1), (3, 2)), "unused": jnp.ones(4)}
    fisher = diagonal_fisher(lambda params, x: x @ params["kernel"], params, x, batch_size=4)
    p = jax.nn.softmax(x @ params["kernel"])[:, 0]
    expected = jnp.mean(jnp.square(x) * (p * (1 - p))[:, None], axis=0)
    np.testing.assert_allclose(fisher["kernel"], jnp.stack([expected, expected], axis=1), rtol=1e-5)
    np.testing.assert_array_equal(fisher["unused"], jnp.zeros(4))


@pytest.mark.parametrize("function", [loss_weights, best_expert])
@pytest.mark.parametrize("losses", [[], [1.0, np.nan], [[1.0]]])
def test_losses_that_are_no_vector_of_numbers_are_refused(function, losses):
    with pytest.raises(ValueError, match=r"losses are .*; expected \[K\], a finite number"):
        function(losses)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="temperature is 0"):
        loss_weights([1.0], temperature=0)
    with pytest.raises(ValueError, match=r"losses have shape \(1,\); expected \[K\] with K = 2"):
        greedy_soup({"w": jnp.zeros((2, 3))}, [1.0], lambda params: 0.0)


@pytest.mark.parametrize(
    ("losses", "temperature"), [([1.0, 2.0], 1e-39), ([1e39, 1.1e39], 1.0), ([-1e308, 1e308], 1.0)]
)
def test_loss_weights_of_any_size_select_the_best_and_are_numbers(losses, temperature):
    np.testing.assert_array_equal(loss_weights(losses, temperature=temperature), [1, 0])


def test_a_soup_never_holds_a_nan_expert():
    experts = {"a": {"w": jnp.array([1.0, jnp.nan, 1.2])}}
    for losses in ([2.0, 1.0, 3.0], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="expert 1 of experts holds nan at a/w; expected finite numbers"):
            greedy_soup(experts, losses, lambda params: jnp.abs(params["a"]["w"]))


def test_a_soup_whose_first_loss_is_no_number_is_refused_and_later_ones_are_worse():
    experts = glue_jax.stack_experts([{"w": jnp.array(value)} for value in (1.0, 2.0, 3.0)])
    with pytest.raises(FloatingPointError, match="loss_fn returned nan for expert 2 alone; expected a finite number"):
        greedy_soup(experts, [3.0, 2.0, 1.0], lambda params: jnp.nan)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        alpha = greedy_soup(
            experts, [1.0, 2.0, 3.0], lambda params, value=value: jnp.where(params["w"] == 1.5, value, 1.0)
        )
        np.testing.assert_array_equal(alpha, [0.5, 0, 0.5])


def test_fisher_information_in_half_precision_is_merged_in_float32():
    experts = {"w": jnp.array([[1.0], [2.0], [6.0]], jnp.float16)}
    # Zeros and 1e-8 are 0 in float16, and 300² is infinite.
    merged = fisher_merge(experts, jax.tree.map(jnp.zeros_like, experts), glue_jax.coefficients.uniform(3))
    assert merged["w"].dtype == jnp.float16
    np.testing.assert_array_equal(merged["w"], [3])
    large = {"w": jnp.full((2, 1), 6e4, jnp.float16)}
    np.testing.assert_array_equal(fisher_merge(large, large, glue_jax.coefficients.uniform(2))["w"], large["w"][0])


def test_the_fisher_information_of_a_network_in_float16_is_in_float32():
    # The gradient is 1e-4 at most, its square 1e-8.
    params = {"kernel": jnp.zeros((3, 2), jnp.float16)}
    fisher = diagonal_fisher(lambda params, x: x @ params["kernel"], params, jnp.full((4, 3), 2e-4, jnp.float16))
    np.testing.assert_allclose(fisher["kernel"], jnp.full((3, 2), 1e-8), rtol=2e-2)


@pytest.mark.parametrize(
    ("fisher", "alpha", "message"),
    [
        ([[-1.0], [1.0]], [0.5, 0.5], "fishers hold -1.0 at a/w; expected Fisher information, which is never negative"),
        ([[1.0], [np.nan]], [0.5, 0.5], "expert 1 of fishers holds nan at a/w"),
        ([[1.0], [np.inf]], [0.5, 0.5], "expert 1 of fishers holds inf at a/w"),
        ([[1.0], [1.0]], [0.0, 0.0], r"alpha is \[0. 0.\]; expected \[K\] with K = 2, none of them negative"),
        ([[1.0], [1.0]], [2.0, -1.0], r"alpha is \[ 2. -1.\]"),
        ([[1.0], [1.0]], [0.5, 0.3, 0.2], r"expected \[K\] with K = 2"),
    ],
)
def test_fisher_information_and_coefficients_that_cannot_be_are_refused(fisher, alpha, message):
    experts = {"a": {"w": jnp.ones((2, 1))}}
    with pytest.raises(ValueError, match=message):
        fisher_merge(experts, {"a": {"w": jnp.array(fisher)}}, jnp.array(alpha))


def test_a_fisher_merge_can_be_jitted():
    experts = {"w": jnp.array([[1.0], [3.0]])}
    merged = jax.jit(fisher_merge)(experts, jax.tree.map(jnp.ones_like, experts), glue_jax.coefficients.uniform(2))
    np.testing.assert_allclose(merged["w"], [2.0])


def test_logits_that_are_not_of_a_batch_are_refused():
    for logits in (lambda params, x: x @ params, lambda params, x: (x @ params)[:, None, None]):
        with pytest.raises(ValueError, match=r"logits_fn returned shape .* for one input; expected"):
            diagonal_fisher(logits, jnp.ones(3), jnp.ones((4, 3)))
