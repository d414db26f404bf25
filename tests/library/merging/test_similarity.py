"""Experts compared by their weights, and by the loss between them."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax

EXPERTS = {"a": jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), "b": jnp.array([[1.0], [1.0], [-1.0]])}


def test_cosines_are_of_all_weights_or_of_each_group():
    found = glue_jax.merging.weight_similarity(EXPERTS)
    assert found.names == ("all",)
    # (1, 0, 1), (0, 2, 1), (3, 0, -1).
    np.testing.assert_allclose(found.cosine[0, 0], [1, 1 / np.sqrt(10), 2 / np.sqrt(20)])
    groups = glue_jax.merging.group_by_path(EXPERTS, "a|b")
    found = glue_jax.merging.weight_similarity(EXPERTS, groups)
    assert found.names == ("a", "b")
    np.testing.assert_allclose(found.cosine[0], [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    np.testing.assert_allclose(found.cosine[1], [[1, 1, -1], [1, 1, -1], [-1, -1, 1]])
    assert found.cosine_from_origin is None


def test_from_an_origin_it_is_what_was_learned():
    origin = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([2.0])}
    found = glue_jax.merging.weight_similarity(EXPERTS, origin=origin)
    # Differences (0, 0, -1), (-1, 2, -1), (2, 0, -3); the origin's length is sqrt(5).
    np.testing.assert_allclose(found.distance[0], np.sqrt([1 / 5, 6 / 5, 13 / 5]))
    assert found.cosine_from_origin is not None
    np.testing.assert_allclose(found.cosine_from_origin[0, 0], [1, 1 / np.sqrt(6), 3 / np.sqrt(13)])


def test_without_an_origin_distances_are_from_the_mean():
    experts = {"w": jnp.array([[1.0, 1.0], [3.0, 1.0]])}
    np.testing.assert_allclose(glue_jax.merging.weight_similarity(experts).distance, [[1 / np.sqrt(5)] * 2])


def test_a_barrier_is_the_rise_over_the_line_between_the_losses():
    experts = {"w": jnp.array([-1.0, 1.0, 3.0])}
    # Valleys at -1 and 1 with 1 between them; from 1 on it is a line.
    barriers = glue_jax.merging.loss_barriers(
        experts,
        lambda params: jnp.where(params["w"] > 1, params["w"] - 1, jnp.square(1 - params["w"] ** 2)),
        num_points=3,
    )
    np.testing.assert_allclose(barriers[0, 1], 1, atol=1e-6)
    np.testing.assert_allclose(barriers[1, 2], 0, atol=1e-6)
    np.testing.assert_allclose(barriers, barriers.T)
    np.testing.assert_array_equal(np.diag(barriers), 0)


def test_a_loss_that_is_no_number_is_named_by_where_it_is():
    experts = {"w": jnp.array([-1.0, 1.0])}
    with pytest.raises(FloatingPointError, match=r"loss_fn returned nan at 0.50 of the way from expert 0 to 1"):
        glue_jax.merging.loss_barriers(
            experts, lambda params: jnp.where(jnp.abs(params["w"]) < 0.5, jnp.nan, 0.0), num_points=1
        )


def test_an_origin_of_zeros_is_infinitely_far_and_one_of_other_shapes_refused():
    experts = {"w": jnp.ones((2, 3))}
    assert np.isinf(glue_jax.merging.weight_similarity(experts, origin={"w": jnp.zeros(3)}).distance).all()
    for origin in ({"w": jnp.zeros(2)}, {"v": jnp.zeros(3)}):
        with pytest.raises(
            ValueError, match="origin does not fit; expected the structure and the shapes of one expert"
        ):
            glue_jax.merging.weight_similarity(experts, origin=origin)


@pytest.mark.parametrize(("num_points", "error"), [(0, ValueError), (2.5, TypeError)])
def test_points_that_are_no_count_are_refused(num_points, error):
    with pytest.raises(error, match=f"num_points is {num_points}; expected"):
        glue_jax.merging.loss_barriers(EXPERTS, lambda params: 0.0, num_points=num_points)


def test_complex_weights_and_losses_that_are_no_scalar_are_refused():
    with pytest.raises(TypeError, match=r"experts at w is (.|\n)*; expected real numbers"):
        glue_jax.merging.weight_similarity({"w": jnp.ones((2, 3)) * 1j})
    with pytest.raises(ValueError, match=r"the value of loss_fn has shape \(3,\); expected one real number"):
        glue_jax.merging.loss_barriers({"w": jnp.ones((2, 3))}, lambda params: params["w"])


def test_weights_are_compared_leaf_by_leaf():
    leaf = np.ones((3, 100_000), np.float32)
    experts = {str(index): leaf for index in range(10)}
    tracemalloc.start()
    glue_jax.merging.weight_similarity(experts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2 * leaf.nbytes  # of ten leaves in float64, which are 20 times leaf.nbytes


def test_the_experts_are_as_they_were():
    experts = {"w": np.array([[1.0, 2.0], [3.0, 4.0]])}
    glue_jax.merging.weight_similarity(experts)
    np.testing.assert_array_equal(experts["w"], [[1, 2], [3, 4]])


def test_groups_of_another_tree_or_of_rows_without_names_are_refused():
    other = glue_jax.merging.group_by_path({"a": 0.0, "c": 0.0}, "a")
    with pytest.raises(ValueError, match=r"groups have rows for \['a', 'c'\]; expected .* \['a', 'b'\]"):
        glue_jax.merging.weight_similarity(EXPERTS, other)
    for row in (-1, 2):
        with pytest.raises(ValueError, match=f"groups has row {row} at b; expected one of the 2 rows with names"):
            glue_jax.merging.weight_similarity(EXPERTS, glue_jax.merging.Groups({"a": 0, "b": row}, ("a", "b")))
    with pytest.raises(TypeError, match="groups is a dict; expected the Groups"):
        glue_jax.merging.weight_similarity(EXPERTS, {"a": 0, "b": 0})  # pyright: ignore[reportArgumentType]


def test_counters_are_no_weights():
    weights = jnp.eye(3)[:, None, :]
    counted = {"fc": weights, "num_batches_tracked": jnp.full((3,), 5000)}
    found, expected = glue_jax.merging.weight_similarity(counted), glue_jax.merging.weight_similarity({"fc": weights})
    assert np.array_equal(found.cosine, expected.cosine)
    assert np.array_equal(found.distance, expected.distance)
