"""The estimates' errors, on functions whose answers are known, and from a command line to the report."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import glue_jax
from experiments import cifar10, digits
from experiments.protocol import presets
from experiments.reporting.presentation import claim_table
from experiments.runtime.stages import Stages
from experiments.studies.variance import __main__ as command
from experiments.studies.variance import estimate_errors as measurement
from experiments.studies.variance import radius, statistics
from experiments.studies.variance.estimate_errors import ESTIMATORS
from experiments.studies.variance.settings import Settings
from experiments.studies.variance.variance_claims import claims, meeting
from glue_jax import theory
from tests.experiments.helpers import TINY, check_report, folder_options, killed_after

GRADIENT = np.array([3.0, -1.0, 0.5, -2.5])


def _quadratic(matrix, linear, beta):
    return linear @ beta + 0.5 * beta @ matrix @ beta


def _cubic(linear, beta):
    return 1 + linear @ beta + (linear @ beta) ** 3


def _rows(estimator, averaged, probes=4000):
    """Error rows of a quadratic function, of which central differences are exact, with gradient `GRADIENT` at ones."""
    matrix = jnp.diag(jnp.arange(4.0))
    at = jnp.ones(4)
    fun = Partial(_quadratic, matrix, jnp.asarray(GRADIENT) - matrix @ at)
    _, gradient = statistics.value_and_gradient(fun, at)
    np.testing.assert_allclose(gradient, GRADIENT, rtol=1e-6)
    directions = glue_jax.directions.sample_directions(jax.random.key(3), at, probes, estimator.directions)
    derivatives = statistics.probe(fun, at, directions, 0.5)
    np.testing.assert_allclose(derivatives, np.asarray(directions) @ GRADIENT, atol=1e-4)
    return statistics.error_rows(directions, derivatives, gradient, estimator, averaged)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_error_of_a_quadratic_is_the_theorys(estimator):
    rows = _rows(estimator, [1, 2, 3, 5, 7])
    for row in rows:
        exact = theory.estimator_mean_squared_error(
            GRADIENT, row["m"], estimator.directions, scale=estimator.scale
        ) / np.sum(GRADIENT**2)
        assert row["exact"] == pytest.approx(exact)
        assert abs(row["error"] - exact) <= 5 * row["error_se"] + 1e-6
        assert row["error_se"] < 0.1 * exact + 1e-6
        assert abs(row["variance"] - row["exact_variance"]) <= 5 * row["variance_se"] + 1e-6
        if row["expected_cosine"] is not None:
            assert abs(row["cosine"] - row["expected_cosine"]) <= 5 * row["cosine_se"] + 1e-6


def test_the_papers_error_is_mostly_bias_which_averaging_leaves():
    (first, many) = _rows(ESTIMATORS[0], [1, 40])
    # K = 4: 1 - 1/K for one direction; (1 - 1/K)² + (K - 1)/(m K²) for 40, where Eq. (19) says 0.75/40.
    assert first["error"] == pytest.approx(0.75, abs=0.02)
    assert many["error"] == pytest.approx(0.5625 + 3 / 640, abs=0.04)
    assert first["variance"] == pytest.approx(3 / 16, abs=0.02)
    assert many["variance"] == pytest.approx(3 / 640, abs=0.002)


def test_whole_blocks_of_orthogonal_directions_have_no_error():
    # The gradient sums to zero, so that three directions of sum zero span it.
    assert GRADIENT.sum() == 0
    for estimator, whole in ((ESTIMATORS[3], 4), (ESTIMATORS[4], 3)):
        for row in _rows(estimator, [whole, 2 * whole]):
            assert row["error"] < 1e-8
            assert row["cosine"] == pytest.approx(1)
            assert row["deviation"] is None


def test_half_a_block_has_the_same_error_whatever_the_draw():
    # With half of the space seen, the estimate is g reflected.
    (row,) = _rows(ESTIMATORS[3], [2])
    assert row["error"] == pytest.approx(1, abs=1e-5)
    assert row["error_se"] < 1e-5
    assert row["deviation"] is None


@pytest.mark.parametrize(("d", "m"), [(2, 1), (5, 2), (10, 1), (10, 4), (10, 9)])
def test_the_cosine_of_orthogonal_directions_is_that_of_a_random_projection(d, m):
    normal = np.random.default_rng(0).normal(size=(4000, d, m))
    share = np.sum(np.linalg.qr(normal)[0][:, 0] ** 2, axis=-1)
    expected = statistics.expected_cosine(d, m, "orthogonal") or 0
    assert expected == pytest.approx(np.sqrt(share).mean(), abs=0.01)
    assert expected <= np.sqrt(m / d)
    if d == 2:
        assert expected == pytest.approx(2 / np.pi)


def test_the_cosine_of_many_directions_on_the_sphere_lies_above_that_of_normal_ones():
    # For normal entries, E cos² = m/(m + d - 1).
    expected = statistics.expected_cosine(10, 10, "sphere")
    assert expected is not None
    assert np.sqrt(10 / 19) < expected < 1
    assert statistics.expected_cosine(10, 10, "rademacher") is None


def test_probes_may_be_evaluated_together():
    fun, directions = Partial(_cubic, jnp.asarray(GRADIENT)), jnp.eye(4)[:3]
    alone = statistics.probe(fun, jnp.zeros(4), directions, 0.1)
    np.testing.assert_allclose(
        statistics.probe(fun, jnp.zeros(4), directions, 0.1, probe_batch_size=4), alone, rtol=1e-4
    )


def test_derivatives_lose_to_rounding_at_small_radii_and_to_curvature_at_large_ones():
    # For L = 1 + s + s³ in s = g.b, the probe along u at 0 gives s + radius² s³ for s = g.u: the error is radius² s³.
    linear = jnp.asarray(GRADIENT / np.linalg.norm(GRADIENT))
    directions = glue_jax.directions.sample_directions(jax.random.key(0), jnp.zeros(4), 64, "sphere")
    radii = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0]
    errors, size = radius.derivative_errors(Partial(_cubic, linear), jnp.zeros(4), directions, radii)
    s = np.asarray(directions, np.float64) @ np.asarray(linear)
    assert size == pytest.approx(np.sqrt(np.mean(s**2)), rel=1e-4)
    np.testing.assert_allclose(errors[-3:], np.array(radii[-3:]) ** 2 * np.sqrt(np.mean(s**6)) / size, rtol=1e-2)
    found = radius.radius_findings(radii, errors, 0.01)
    assert found["rounding_power"] == pytest.approx(-1, abs=0.25)
    assert found["curvature_power"] == pytest.approx(2, abs=0.1)
    low, high = found["good_radii"]
    assert 1e-6 < low < found["best_radius"] < high < 0.3
    # radius² sqrt(E s⁶/E s²) = 0.01
    assert high == pytest.approx(np.sqrt(0.01 * size / np.sqrt(np.mean(s**6))), rel=0.02)


def test_good_radii_end_where_the_sweep_does_and_may_be_none():
    found = radius.radius_findings([0.1, 1.0, 10.0], [0.001, 0.002, 0.1], 0.01)
    assert found["good_radii"][0] == pytest.approx(0.1)
    assert found["rounding_power"] is None
    assert found["curvature_power"] == pytest.approx(np.log10(50))
    # Halfway from 0.002 to 0.1 on logarithmic axes lies 0.0141.
    assert found["good_radii"][1] == pytest.approx(10 ** (np.log(5) / np.log(50)))
    nowhere = {"best_radius": 0.1, "good_radii": None, "rounding_power": None, "curvature_power": None}
    assert radius.radius_findings([0.1, 1.0], [0.2, 0.3], 0.01) == nowhere


def test_the_experts_norms_are_those_of_all_floating_point_leaves_together():
    rng = np.random.default_rng(0)
    experts = {"w": rng.normal(size=(3, 2, 5)).astype(np.float32), "b": rng.normal(size=(3, 4)).astype(np.float32)}
    columns = np.concatenate([experts["w"].reshape(3, -1), experts["b"]], axis=1)
    experts["count"] = np.full(3, 1000)
    stacked = jax.tree.map(jnp.asarray, experts)
    expected = np.linalg.norm(columns, 2), np.linalg.norm(columns)
    assert statistics.expert_norms(stacked) == pytest.approx(expected, rel=1e-6)


def test_losses_and_gradients_that_are_no_use_are_refused():
    with pytest.raises(FloatingPointError, match="gradient of norm 0"):
        statistics.value_and_gradient(Partial(_cubic, jnp.zeros(4)), jnp.zeros(4))
    with pytest.raises(FloatingPointError, match=r"a probe of radius 0.1 has a loss of nan"):
        statistics.probe(Partial(_cubic, jnp.full(4, jnp.nan)), jnp.zeros(4), jnp.ones((1, 4)), 0.1)


OPTIONS = ["--preset", "tiny", "--probes", "32", "--averaged", "1", "4", "2", "--subsets", "2", "8"]
OPTIONS += ["--radius-directions", "16", "--examples", "16"]


def _main(folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(digits.PRESETS, "tiny", dataclasses.replace(TINY, num_experts=3))
        return command.main([*OPTIONS, *folder_options(folder), *options])


def test_the_default_preset_is_the_experiments_own():
    parsed = presets.parse(command.Arguments, "variance", "", ["--experiment", "cifar10", "--probes", "512"])
    assert (parsed.preset, parsed.config) == ("paper", cifar10.PRESETS["paper"])
    assert (str(parsed.run_dir), str(parsed.out_dir)) == ("runs/cifar10", "runs/variance-cifar10")
    parsed = presets.parse(command.Arguments, "variance", "", ["--experiment", "cifar10", "--preset", "quick"])
    assert (parsed.config, str(parsed.run_dir)) == (cifar10.PRESETS["quick"], "runs/cifar10-quick")
    assert presets.parse(command.Arguments, "variance", "", []).config == digits.PRESETS["quick"]


def test_an_accelerator_is_given_so_many_images_at_once(monkeypatch):
    nothing: Any = None
    setting = measurement._Setting(*[nothing] * 7)._replace(settings=Settings(examples=300))
    monkeypatch.setattr(measurement, "on_cpu", lambda data: False)
    assert setting.probe_batch_size == 6
    assert setting._replace(settings=Settings(examples=10_000)).probe_batch_size == 1
    monkeypatch.setattr(measurement, "on_cpu", lambda data: True)
    assert setting.probe_batch_size is None


def _row(k, m, error, variance, point="uniform", **fields):
    means = {"error": error, "error_se": 1e-3, "variance": variance, "variance_se": 1e-3}
    theirs = {"equation_19": (k - 1) / (m * k), "bound": 4 * (k - 1) / (m * k)}
    return {"point": point, "K": k, "m": m, "space": "alpha", "directions": "sphere", **means, **theirs, **fields}


def test_the_papers_claims_by_hand():
    # Exact values: the error is (1 - 1/K)² + (K - 1)/(m K²). With K = 2 Eq. (19) is 0.05 for m = 10.
    alpha = [_row(2, 1, 0.5, 0.25), _row(2, 10, 0.275, 0.025), _row(4, 1, 0.75, 0.1875), _row(4, 10, 0.58, 0.01875)]
    beta = [_row(k, 1, 0, k - 1.0, space="beta") for k in (2, 4)]
    norms = {"experts_spectral_norm": 3.0, "parameter_gradient_norm": 2.0, "alpha_gradient_norm": 3.0}
    points = [{"point": "uniform", "K": k, "experts_frobenius_norm": 4.0, **norms} for k in (2, 4)]
    radii = {"point": "uniform", "radii": [1e-3, 0.1, 1.0], "errors": [0.5, 0.01, 2.0], "best_radius": 0.1}
    found = claim_table(claims({"errors": [*alpha, *beta], "points": points, "radii": [radii]}))[1]
    assert [row[3:] for row in found] == [
        ["0.25 to 0.562", "no"],
        ["1", "yes"],
        ["5.5 to 7.73", "no"],
        ["0.25 to 0.5", "no"],
        ["0.517 to 4", "in 2 of 4"],
        ["8 to 16", "yes"],
        ["0.1", "yes"],
        ["0.75", "no"],
        ["-", "-"],
        ["0.75", "no"],
        ["3", "yes"],
        ["0.02", "yes"],
    ]
    # sigma² ||grad_theta L||² over ||g||² is 4: 4 (K - 1)/(m K) and the error meet at m = (4 K - 1)/(K - 1).
    assert [meeting(point) for point in points] == [7, 5]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variance")
    return _main(folder), folder


def test_results_hold_each_point_estimator_and_m(done):
    results, _ = done
    points = [(row["point"], row["K"]) for row in results["points"]]
    assert points == [("uniform", 3), ("uniform", 2), ("learned", 3), ("corner", 3)]
    # The numbers asked for, and K - 1 and K.
    ms = {2: (1, 2, 4), 3: (1, 2, 3, 4)}
    expected = [(*point, *estimator, m) for point in points for estimator in ESTIMATORS for m in ms[point[1]]]
    assert [
        tuple(row[name] for name in ("point", "K", "space", "directions", "scale", "m")) for row in results["errors"]
    ] == expected
    assert [row["point"] for row in results["radii"]] == ["uniform", "learned", "corner"]


def test_points_lie_where_they_say(done):
    results, _ = done
    uniform, pair, learned, corner = (np.array(row["alpha"]) for row in results["points"])
    np.testing.assert_allclose(uniform, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(pair, 1 / 2)
    assert 0 < np.abs(learned - uniform).max() < 0.05
    np.testing.assert_allclose(np.sort(corner), [0.05, 0.05, 0.9])


def test_the_norms_of_equation_20_bound_the_gradient_and_proposition_1_follows_from_them(done):
    results, _ = done
    for point in results["points"]:
        above = point["experts_spectral_norm"] * point["parameter_gradient_norm"]
        assert point["alpha_gradient_norm"] <= above * (1 + 1e-5)
        rows = [
            row
            for row in results["errors"]
            if row["space"] == "alpha" and (row["point"], row["K"]) == (point["point"], point["K"])
        ]
        for row in rows:
            k, m = row["K"], row["m"]
            assert row["equation_19"] == pytest.approx((k - 1) / (m * k))
            slack = (above / point["alpha_gradient_norm"]) ** 2
            assert row["bound"] == pytest.approx(slack * row["equation_19"], rel=1e-4)


def test_probes_of_a_network_have_the_theorys_error(done):
    results, _ = done
    for row in results["errors"]:
        assert abs(row["error"] - row["exact"]) <= 4 * row["error_se"] + 0.02 * row["exact"] + 1e-3


def test_a_run_says_first_how_many_experts_are_to_be_trained(done, tmp_path, monkeypatch, capsys):
    _, folder = done

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    printed = []
    for run_dir in (folder / "run", tmp_path):
        with pytest.raises(SystemExit):
            _main(tmp_path, "--run-dir", str(run_dir))
        printed.append(capsys.readouterr().out)
    assert "experts to train first: 0 of " in printed[0]
    assert "experts to train first: 3 of 3" in printed[1]


def test_the_report_has_its_files_and_says_what_was_measured(done):
    results, folder = done
    report = check_report(folder / "out", results, "variance.png")
    assert "python -m experiments.studies.variance --preset tiny --probes 32" in report
    row = results["errors"][0]
    assert f"| uniform | 3 | 1 | 32 | {row['error']:.3f} ± {row['error_se']:.3f} | 0.6667 |" in report
    for where in results["radii"]:
        assert f"| {where['point']} | {100 * where['error_at_radius']:.2g} |" in report


def test_a_repeated_run_measures_nothing_and_ends_with_the_same_results(done, monkeypatch):
    results, folder = done
    monkeypatch.setattr(Stages, "write", lambda *_: pytest.fail("a part was done again"))
    assert _main(folder) == results


def test_other_numbers_of_directions_measure_the_errors_anew_and_nothing_else(done, written):
    _, folder = done
    _main(folder, "--averaged", "1", "3")
    assert len(written) == 4 * len(ESTIMATORS)
    assert all(name.startswith("errors/") for name in written)


def test_an_interrupted_run_goes_on(done, tmp_path, capsys):
    results, folder = done
    with killed_after(12), pytest.raises(SystemExit) as stopped:
        _main(tmp_path, "--run-dir", str(folder / "run"))
    assert stopped.value.code == 130
    assert f"kept in {tmp_path / 'out'}" in capsys.readouterr().out
    again = _main(tmp_path, "--run-dir", str(folder / "run"))
    assert again["errors"] == results["errors"]
    assert [row["errors"] for row in again["radii"]] == [row["errors"] for row in results["radii"]]
