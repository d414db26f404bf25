"""The paper's formulas, and the exact ones, against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from glue_jax import theory

# F = 10, gamma = 2, C_mix = 3, D_alpha = 1: T_full = 3 * 10 + 3 + 1 = 34, T_SPSA = 2 * (10 + 3) = 26.
COST = (10.0, 2.0, 3.0, 1.0)


def test_costs_of_equation_9():
    assert theory.full_gradient_cost(*COST) == 34
    assert theory.spsa_cost(10.0, 3.0) == 26
    assert theory.spsa_cost(10.0, 3.0, num_directions=4) == 104


@pytest.mark.parametrize("cost", [COST, (1.0, 2.0, 5.0, 0.5), (2.0, 1.0, 0.1, 0.0), (7.0, 1.5, 0.0, 0.25)])
def test_equation_10_is_the_sign_of_the_difference_of_the_costs_of_equation_9(cost):
    forward, _, blend, _ = cost
    saving = theory.full_gradient_cost(*cost) - theory.spsa_cost(forward, blend)
    assert theory.spsa_is_cheaper(*cost) == (saving > 0)


@pytest.mark.parametrize(("blend", "cheaper"), [(10.9, True), (11.0, False), (11.1, False)])
def test_spsa_is_cheaper_just_where_blending_costs_less_than_the_backward_pass_saves(blend, cheaper):
    # (gamma - 1) F + D_alpha = 11.
    assert theory.spsa_is_cheaper(10.0, 2.0, blend, 1.0) is cheaper


@pytest.mark.parametrize(
    ("directions", "d", "m", "expected"),
    [
        ("rademacher", 10, 1, 9),
        ("rademacher", 10, 3, 3),
        ("sphere", 4, 2, 1.5),
        ("gaussian", 10, 1, 11),
        ("gaussian", 3, 8, 0.5),
        ("orthogonal", 10, 1, 9),  # one direction: as on the sphere
        ("orthogonal", 4, 2, 1),  # (4/2)² 1/2 (1 - 1/2)
        ("orthogonal", 4, 4, 0),
        ("orthogonal", 4, 8, 0),
        ("orthogonal", 4, 6, 1 / 9),  # (4/6)² 1/2 (1 - 1/2)
        ("simplex_orthogonal", 4, 2, 1),
        ("simplex_orthogonal", 1, 5, 0),
        ("rademacher", 1, 1, 0),
    ],
)
def test_relative_variances(directions, d, m, expected):
    np.testing.assert_allclose(theory.relative_variance(d, m, directions), expected, rtol=1e-12)


def test_the_mean_is_the_gradient_or_its_zero_sum_part():
    g = [3.0, 0.0, 0.0]
    np.testing.assert_allclose(theory.estimator_mean(g), g)
    np.testing.assert_allclose(theory.estimator_mean(g, "simplex_orthogonal"), [2, -1, -1])
    np.testing.assert_allclose(theory.estimator_mean(g, "sphere", scale="paper"), [1, 0, 0])
    np.testing.assert_allclose(theory.estimator_mean(g, "simplex_orthogonal", scale="paper"), [1, -0.5, -0.5])


def test_the_mean_of_groups_is_projected_row_by_row():
    g = jnp.array([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(theory.estimator_mean(g, "simplex_orthogonal"), [[2, -1, -1], [0, 0, 0]])
    # d = 2 (3 - 1)
    np.testing.assert_allclose(
        theory.estimator_mean(g, "simplex_orthogonal", scale="paper"), [[0.5, -0.25, -0.25], [0, 0, 0]]
    )


def test_the_mean_squared_error_adds_the_variance_and_the_part_that_is_not_probed():
    # ||g||² = 9, its zero-sum part 6, its mean's part 3; V(m = 1, d = 2) = 1.
    g = [3.0, 0.0, 0.0]
    np.testing.assert_allclose(theory.estimator_mean_squared_error(g, 1), 2 * 9)
    np.testing.assert_allclose(theory.estimator_mean_squared_error(g, 1, "simplex_orthogonal"), 3 + 6)
    np.testing.assert_allclose(theory.estimator_mean_squared_error(g, 2, "simplex_orthogonal"), 3)
    # The paper's scale: the mean is [1, -1/2, -1/2], so the bias² is 4 + 1/4 + 1/4; the variance 6/4.
    np.testing.assert_allclose(theory.estimator_mean_squared_error(g, 1, "simplex_orthogonal", scale="paper"), 6)


@pytest.mark.parametrize(("m", "expected"), [(1, 0.90), (2, 0.855), (10, 0.819)])
@pytest.mark.parametrize("directions", ["rademacher", "sphere"])
def test_averaging_hardly_lowers_the_error_of_the_papers_estimate(directions, m, expected):
    g = np.arange(1.0, 11.0)
    error = theory.estimator_mean_squared_error(g, m, directions, scale="paper") / np.sum(g**2)
    np.testing.assert_allclose(error, expected, rtol=1e-12)


@pytest.mark.parametrize("k", [2, 5, 10])
def test_the_papers_error_is_exact_for_one_direction_on_the_sphere_and_wrong_for_more(k):
    g = np.linspace(-1.0, 2.0, k)

    def exact(m):
        return theory.estimator_mean_squared_error(g, m, "sphere", scale="paper")

    np.testing.assert_allclose(theory.paper_mean_squared_error(g), exact(1), rtol=1e-12)
    for m in (2, 10):
        # The bias² (1 - 1/K)² stays; only the variance (K - 1)/K² is divided by m.
        expected = ((1 - 1 / k) ** 2 + (k - 1) / (m * k**2)) * np.sum(g**2)
        np.testing.assert_allclose(exact(m), expected, rtol=1e-12)
        np.testing.assert_allclose(theory.paper_mean_squared_error(g, m), exact(1) / m, rtol=1e-12)
        assert exact(m) > 1.05 * theory.paper_mean_squared_error(g, m)


def test_the_papers_error_of_known_numbers():
    # (K - 1)/(m K) ||g||² = 3/(2 4) 16
    assert theory.paper_mean_squared_error([4.0, 0.0, 0.0, 0.0], 2) == 6


def test_the_bound_of_proposition_1():
    # (K - 1)/(m K) = 3/8, times 2² 3².
    assert theory.proposition_1_bound(4, 2, experts_spectral_norm=2.0, parameter_gradient_norm=3.0) == 13.5


def test_the_bound_holds_the_papers_error_where_equation_20_holds():
    # g = Theta^T h, so that ||g|| <= sigma_max ||h||.
    rng = np.random.default_rng(0)
    experts, h = rng.normal(size=(5, 30)), rng.normal(size=30)
    bound = theory.proposition_1_bound(5, 1, float(np.linalg.norm(experts, 2)), float(np.linalg.norm(h)))
    error = theory.estimator_mean_squared_error(experts @ h, 1, "sphere", scale="paper")
    assert 0 < error <= bound


G = [1.0, 2.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: theory.relative_variance(3, 1, "nope"), "directions is 'nope'; expected one of"),  # pyright: ignore
        (lambda: theory.relative_variance(3, 1, None), "directions is None; expected one of"),  # pyright: ignore
        (lambda: theory.estimator_mean(G, "nope"), "directions is 'nope'; expected one of"),  # pyright: ignore
        (lambda: theory.estimator_mean(G, scale="nope"), "scale is 'nope'; expected one of"),  # pyright: ignore
        (lambda: theory.estimator_mean_squared_error(G, 1, scale="nope"), "scale is 'nope'"),  # pyright: ignore
        (lambda: theory.relative_variance(0, 1), "d is 0; expected at least 1"),
        (lambda: theory.relative_variance(0, 1, "orthogonal"), "d is 0"),
        (lambda: theory.relative_variance(3, 0), "num_directions is 0"),
        (lambda: theory.estimator_mean_squared_error(G, -1), "num_directions is -1"),
        (lambda: theory.estimator_mean_squared_error(G, 0), "num_directions is 0"),
        (lambda: theory.estimator_mean_squared_error([], 1), "nothing to probe"),
        (lambda: theory.paper_mean_squared_error(G, 0), "num_directions is 0"),
        (lambda: theory.paper_mean_squared_error([]), "the gradient's size is 0"),
        (lambda: theory.proposition_1_bound(0, 1, 1.0, 1.0), "num_experts is 0"),
        (lambda: theory.proposition_1_bound(2, 0, 1.0, 1.0), "num_directions is 0"),
        (lambda: theory.spsa_cost(1.0, 1.0, num_directions=-1), "num_directions is -1"),
        (lambda: theory.estimator_mean(5.0), r"gradient is 5.0; expected \[K\] or \[G, K\]"),
        (lambda: theory.paper_mean_squared_error(5.0), "gradient is 5.0"),
    ],
)
def test_names_and_counts_that_cannot_be_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_gradients_and_counts_of_other_types_are_refused():
    with pytest.raises(TypeError, match=r"num_directions is 2.5; expected an integer"):
        theory.relative_variance(3, 2.5)  # pyright: ignore
    for gradient in (None, np.array([1j, 2])):
        with pytest.raises(TypeError, match=r"gradient is .*; expected real numbers"):
            theory.estimator_mean(gradient)  # pyright: ignore
