"""Rounded products, and the command that measures what rounding does to the slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import numerics
from experiments.studies.rounding import with_rounded_products
from tests.experiments.helpers import check_report, folder_options

X, W = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((0, (5, 7)), (1, (7, 3))))


def layer(x, w):
    return jax.nn.relu(x @ w)


def rounded(value, digits):
    return jax.lax.reduce_precision(value, 8, digits)


@pytest.mark.parametrize("digits", [7, 10])
def test_the_operands_of_a_product_are_rounded(digits):
    found = jax.jit(with_rounded_products(layer, digits))(X, W)
    np.testing.assert_allclose(found, layer(rounded(X, digits), rounded(W, digits)), rtol=1e-5)
    assert np.abs(found - layer(X, W)).max() > 1e-4


def test_a_product_that_asks_for_the_highest_precision_is_not_rounded():
    with jax.default_matmul_precision("highest"):
        found = with_rounded_products(layer, 7)(X, W)
    np.testing.assert_allclose(found, layer(X, W), rtol=1e-6)
    by_itself = with_rounded_products(lambda x, w: jnp.matmul(x, w, precision="highest"), 7)(X, W)
    np.testing.assert_allclose(by_itself, X @ W, rtol=1e-6)


def test_rounded_functions_are_differentiated_and_vmapped():
    function = with_rounded_products(layer, 7)
    _, slope = jax.jvp(lambda w: function(X, w), (W,), (jnp.ones_like(W),))
    exact = jax.jvp(lambda w: layer(rounded(X, 7), w), (rounded(W, 7),), (jnp.ones_like(W),))[1]
    np.testing.assert_allclose(slope, exact, rtol=1e-2)
    both = jax.vmap(function, in_axes=(None, 0))(X, jnp.stack([W, 2 * W]))
    np.testing.assert_allclose(both, [function(X, W), function(X, 2 * W)], rtol=1e-5)


def test_a_product_inside_a_branch_is_refused():
    def branched(x, w):
        return jax.lax.cond(True, lambda: x @ w, lambda: 2 * (x @ w))

    with pytest.raises(ValueError, match="fun has a product inside cond, which is not rounded here"):
        jax.jit(with_rounded_products(branched, 7))(X, W)


def test_the_report_has_the_error_of_each_number_format(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "RADII", (0.1,))
    monkeypatch.setattr(numerics, "DTYPES", {"bfloat16": jnp.bfloat16})
    monkeypatch.setattr(numerics, "ARITHMETIC", ("float32", "bfloat16 products"))
    results = numerics.main(["--num-experts", "3", *folder_options(tmp_path)])
    exact, short = results["rows"][:2]
    assert [row["experts"] for row in results["rows"]] == 2 * (["as trained"] * 2 + ["1 % apart"] * 2)
    assert [row["link"] for row in results["rows"]] == ["softmax"] * 4 + ["free"] * 4
    assert exact["spsa"][0]["error"] < 0.1 < short["spsa"][0]["error"]
    # The steps' defaults ask for products that are not rounded, or take no difference.
    assert max(row["default_spsa"] for row in results["rows"]) < 0.1
    assert max(row["default_tangents"] for row in results["rows"]) < 0.1
    report = check_report(tmp_path / "out", results)
    assert "| softmax | 1 % apart | bfloat16 | bfloat16 products |" in report
