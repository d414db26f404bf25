"""Experts compared by their weights, and by the loss between them."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from experiments import digits
from experiments.studies import similarity as preflight
from tests.test_protocol import TINY

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
    with pytest.raises(FloatingPointError, match=r"the loss is nan at 0.50 of the way from expert 0 to 1"):
        glue_jax.merging.loss_barriers(
            experts, lambda params: jnp.where(jnp.abs(params["w"]) < 0.5, jnp.nan, 0.0), num_points=1
        )


def test_an_origin_of_zeros_is_infinitely_far_and_one_of_other_shapes_refused():
    experts = {"w": jnp.ones((2, 3))}
    assert np.isinf(glue_jax.merging.weight_similarity(experts, origin={"w": jnp.zeros(3)}).distance).all()
    for origin in ({"w": jnp.zeros(2)}, {"v": jnp.zeros(3)}):
        with pytest.raises(ValueError, match="origin is not of the structure and the shapes of one expert"):
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
    with pytest.raises(ValueError, match=r"groups are of another tree .* rows for \['a', 'c'\]; expected \['a', 'b'\]"):
        glue_jax.merging.weight_similarity(EXPERTS, other)
    for row in (-1, 2):
        with pytest.raises(ValueError, match=f"groups has row {row} at b; expected one of the 2 that have names"):
            glue_jax.merging.weight_similarity(EXPERTS, glue_jax.merging.Groups({"a": 0, "b": row}, ("a", "b")))
    with pytest.raises(TypeError, match="groups is a dict; expected a Groups"):
        glue_jax.merging.weight_similarity(EXPERTS, {"a": 0, "b": 0})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(digits.PRESETS, "quick", TINY)


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize("initialization", ["common", "separate"])
def test_a_runs_experts_are_compared_and_advised_on(tiny, tmp_path, initialization):
    words = ["--run-dir", str(tmp_path / "run"), "--out-dir", str(tmp_path / "out"), "--barriers", "2"]
    results = preflight.main([*words, "--initialization", initialization])
    assert [row["module"] for row in results["modules"]] == ["conv1", "conv2", "head", "norm1", "norm2"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "nan" not in report
    if initialization == "common":
        # Two epochs do not go far.
        assert results["cosine"] > 0.8
        assert "weights are related" in report
        assert all(row["cosine_from_origin"] is not None for row in results["modules"])
    else:
        kernels = [row["cosine"] for row in results["modules"] if row["module"].startswith("conv")]
        assert max(map(abs, kernels)) < 0.3
        assert abs(results["cosine"]) < 0.1
        assert "Align them first" in report
        assert results["aligned_cosine"] > results["cosine"]
    assert results["barriers"].keys() == {"blended statistics", "statistics refreshed"}


@pytest.mark.parametrize(
    ("cosine", "barriers", "message"),
    [
        (0.02, {"blended statistics": [[0.0]]}, "Align them first"),
        (0.88, {}, "Barriers tell"),
        (0.88, {"blended statistics": [[0.0, 0.05]]}, "average them."),
        (0.88, {"blended statistics": [[0.0, 2.0]], "statistics refreshed": [[0.0, 0.05]]}, "refresh the statistics"),
        (0.88, {"blended statistics": [[0.0, 2.0]], "statistics refreshed": [[0.0, 1.0]]}, "Learn free coefficients"),
    ],
)
def test_the_advice_follows_weights_and_barriers(cosine, barriers, message):
    assert message in preflight.advice(cosine, barriers)


@pytest.mark.parametrize("barriers", ["1", "-1"])
def test_a_number_of_barriers_that_cannot_be_is_refused(tiny, tmp_path, barriers, capsys):
    with pytest.raises(SystemExit) as stopped:
        preflight.main(["--out-dir", str(tmp_path / "out"), "--barriers", barriers])
    printed = capsys.readouterr()
    said = " ".join(f"{stopped.value.code} {printed.out} {printed.err}".replace("│", " ").split())
    assert f"barriers is {barriers}; expected 0, or at least 2 experts" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-experts", "1"], "num_experts is 1; expected at least 2 for this command"),
        (["--run-dir", "out"], "out_dir is out, which is run_dir: expected another folder"),
        (["--run-dir", "a/../out"], "which is run_dir"),
    ],
)
def test_what_cannot_be_compared_or_would_be_written_over_is_refused_before_any_work(
    tiny, tmp_path, words, message, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        preflight.main(["--out-dir", "out", *words])
    assert not list(tmp_path.iterdir())
