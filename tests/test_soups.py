"""Baselines: weights from losses, soups, Fisher-weighted averages; objectives without a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax


def test_loss_weights_are_a_softmax_of_negative_losses():
    losses = np.log([1.0, 2.0, 4.0])
    np.testing.assert_allclose(glue_jax.loss_weights(losses), np.array([4, 2, 1]) / 7, rtol=1e-6)
    np.testing.assert_allclose(glue_jax.loss_weights(losses, temperature=0.5), np.array([16, 4, 1]) / 21, rtol=1e-6)
    np.testing.assert_allclose(glue_jax.loss_weights(losses, temperature=1e6), [1 / 3] * 3, rtol=1e-5)


def test_the_best_expert_has_the_lowest_loss():
    np.testing.assert_array_equal(glue_jax.best_expert([2.0, 1.0, 3.0]), [0, 1, 0])


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

    alpha = glue_jax.greedy_soup(experts, np.abs(values - 1), loss)
    np.testing.assert_allclose(alpha, np.array([0.5, 0.5, 0, 0])[permutation])
    np.testing.assert_allclose(asked, [1.1, 0.95, 3.2 / 3, 1.1], rtol=1e-6)


def test_a_soup_is_judged_by_one_metric_alone():
    # Cross-entropies give the order; of error rates the first expert's is the only one at 0.
    experts = glue_jax.stack_experts([{"w": jnp.array(value)} for value in (0.0, 1.0, 2.0)])
    alpha = glue_jax.greedy_soup(experts, [2.3, 2.4, 2.5], lambda params: jnp.minimum(params["w"], 0.9))
    np.testing.assert_array_equal(alpha, [1, 0, 0])


def test_a_soup_of_equal_experts_keeps_all():
    experts = glue_jax.stack_experts([{"w": jnp.ones(2)}] * 3)
    np.testing.assert_allclose(glue_jax.greedy_soup(experts, [1.0, 1.0, 1.0], lambda params: 1.0), [1 / 3] * 3)


def test_fisher_weights_are_of_each_parameter():
    experts = glue_jax.stack_experts([{"w": jnp.array([0.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}])
    fishers = {"w": jnp.array([[1.0, 3.0], [3.0, 1.0]])}
    merged = glue_jax.fisher_merge(experts, fishers, glue_jax.uniform(2))
    np.testing.assert_allclose(merged["w"], [0.75, 0.25], rtol=1e-6)
    merged = glue_jax.fisher_merge(experts, fishers, jnp.array([0.75, 0.25]))
    np.testing.assert_allclose(merged["w"], [0.5, 0.1], rtol=1e-6)


def test_without_fisher_information_it_is_the_blend():
    experts = glue_jax.stack_experts([{"w": jnp.array([2.0, 4.0])}, {"w": jnp.array([4.0, 0.0])}])
    alpha = jnp.array([0.25, 0.75])
    merged = glue_jax.fisher_merge(experts, jax.tree.map(jnp.zeros_like, experts), alpha)
    np.testing.assert_allclose(merged["w"], glue_jax.blend(experts, alpha)["w"], rtol=1e-6)


def test_leaves_that_are_not_floating_point_have_no_fisher_information():
    def logits(params, inputs):
        return inputs @ params["w"] + params["steps"]

    model = {"w": jnp.eye(3), "steps": jnp.array(27)}
    fisher = jax.jit(functools.partial(glue_jax.diagonal_fisher, logits))(model, jnp.ones((4, 3)))
    assert float(fisher["steps"]) == 0
    assert (fisher["w"] > 0).all()
    merged = glue_jax.fisher_merge(
        glue_jax.stack_experts([model] * 3), glue_jax.stack_experts([fisher] * 3), jnp.array([0.2, 0.5, 0.3])
    )
    assert int(merged["steps"]) == 27
    np.testing.assert_allclose(merged["w"], jnp.eye(3), atol=1e-6)


def test_fisher_information_of_other_shapes_is_refused():
    experts = {"w": jnp.ones((2, 3))}
    for shape in ((2, 1), (2, 4)):
        with pytest.raises(ValueError, match="fishers are not of the structure and the shapes of experts"):
            glue_jax.fisher_merge(experts, {"w": jnp.ones(shape)}, glue_jax.uniform(2))
    with pytest.raises(ValueError, match="epsilon is 0"):
        glue_jax.fisher_merge(experts, experts, glue_jax.uniform(2), epsilon=0)


def test_the_fisher_information_of_a_linear_classifier_by_hand():
    # log p(y) has gradient x (e_y - p) for the kernel: its square's expectation is x^2 p (1 - p) in two classes.
    x = jax.random.normal(jax.random.key(0), (7, 3))
    params = {"kernel": jax.random.normal(jax.random.key(1), (3, 2)), "unused": jnp.ones(4)}
    fisher = glue_jax.diagonal_fisher(lambda params, x: x @ params["kernel"], params, x, batch_size=4)
    p = jax.nn.softmax(x @ params["kernel"])[:, 0]
    expected = jnp.mean(jnp.square(x) * (p * (1 - p))[:, None], axis=0)
    np.testing.assert_allclose(fisher["kernel"], jnp.stack([expected, expected], axis=1), rtol=1e-5)
    np.testing.assert_array_equal(fisher["unused"], jnp.zeros(4))


@pytest.mark.parametrize("function", [glue_jax.loss_weights, glue_jax.best_expert])
@pytest.mark.parametrize("losses", [[], [1.0, np.nan], [[1.0]]])
def test_losses_that_are_no_vector_of_numbers_are_refused(function, losses):
    with pytest.raises(ValueError, match=r"losses are .*; expected \[K\] finite numbers"):
        function(losses)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="temperature is 0"):
        glue_jax.loss_weights([1.0], temperature=0)
    with pytest.raises(ValueError, match=r"losses have shape \(1,\); expected \[K\] with K = 2"):
        glue_jax.greedy_soup({"w": jnp.zeros((2, 3))}, [1.0], lambda params: 0.0)


def test_an_error_rate_is_one_less_the_accuracy():
    logits = jnp.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [1.0, 0.0]])
    assert glue_jax.error_rate(logits, jnp.array([0, 1, 1, 0])) == 0.25


def test_entropy_is_that_of_the_predictions():
    np.testing.assert_allclose(glue_jax.entropy(jnp.zeros((3, 4))), np.log(4), rtol=1e-6)
    np.testing.assert_allclose(glue_jax.entropy(jnp.array([[1e4, 0.0], [0.0, 1e4]])), 0, atol=1e-6)
    p = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(glue_jax.entropy(jnp.log(p)[None]), -(p * np.log(p)).sum(), rtol=1e-5)
