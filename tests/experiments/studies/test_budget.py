"""The ways of the budget study: what they take, and that each of them learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from experiments.studies import budget
from experiments.studies.sharing import Coefficients
from experiments.studies.ways import ways
from tests.experiments.helpers import check_report, folder_options
from tests.helpers import compilations
from tests.library.helpers import CLASSIFICATION, K, classification

RATES = {"spsa": 0.1, "spsa_d": 0.1, "forward": 0.1, "full": 0.1}
PAPER = functools.partial(glue_jax.spsa_step, radius=1e-2, directions="sphere")
WAYS = ways(RATES, PAPER, optax.adam(1e-2))


SMALL_WAYS = [way for way in WAYS if way.above < K - 1]


@pytest.fixture
def problem_and_data():
    # As the experiments' images, they are bound to a device.
    experts, data = jax.device_put(classification(), jax.devices()[0])
    merge = functools.partial(glue_jax.blend, min_dtype=jnp.float32)
    return Coefficients(experts, jnp.zeros(K), jax.nn.softmax, merge, CLASSIFICATION), data


@pytest.mark.parametrize("way", SMALL_WAYS, ids=lambda way: way.name)
def test_each_way_lowers_the_loss_and_compiles_nothing_on_the_clock(way, problem_and_data, caplog):
    problem, data = problem_and_data
    assert problem.dimension == K - 1
    stepper = way.begin(problem, jax.random.key(0), 2000)
    stepper.compile(data)
    state = stepper.state
    with compilations(caplog) as names:
        for _ in range(60):
            state = stepper.step(state, data)
    assert not [name for name in names if "step" in name or "loss" in name]

    def loss(beta):
        return float(CLASSIFICATION(problem.merge_fn(problem.experts, jax.nn.softmax(beta)), data))

    assert loss(stepper.beta(state)) < loss(problem.beta) - 1e-3


@pytest.mark.parametrize("way", SMALL_WAYS, ids=lambda way: way.name)
def test_a_steps_flops_are_those_of_all_its_passes(way, problem_and_data):
    problem, data = problem_and_data
    flops = way.begin(problem, jax.random.key(0), 2000).flops
    if way.name == "CMA-ES":
        assert flops is None
        return
    # The network's two products, of one model on all examples.
    of_products = 2 * len(data["y"]) * sum(leaf[0].size for leaf in problem.experts.values())
    assert flops is not None
    passes = way.forward(K - 1) + way.backward
    assert 1 <= flops(data) / (passes * of_products) < 3


def test_what_a_step_of_each_way_takes():
    passes = {way.name: (way.forward(9), way.backward) for way in WAYS}
    assert passes == {
        "SPSA, as in the paper": (2, 0),
        "SPSA, m = 1": (2, 0),
        "SPSA, m = d": (18, 0),
        "forward gradient, m = 1": (1, 0),
        "full gradient, as in the paper": (1, 1),
        "full gradient": (1, 1),
        "Gauss-Newton, differences": (11, 0),
        "Gauss-Newton, tangents": (11, 0),
        "Gauss-Newton, differences, m = 16": (18, 0),
        "Gauss-Newton, 3 starts": (33, 0),
        "CMA-ES": (10, 0),
    }


def curve(way, seed, losses):
    points = [100 * index for index in range(len(losses))]
    return {
        "sharing": "softmax",
        "dimension": 9,
        "way": way,
        "seed": seed,
        "forward": points,
        "backward": [0] * len(points),
        "learning_seconds": [index / 1000 for index in points],
        "flops": [1e7 * index for index in points],
        "validation_loss": losses,
        "test_loss": [loss + 1 for loss in losses],
    }


def test_there_is_within_one_percent_of_each_seeds_best():
    curves = [
        curve("a", 0, [3.0, 2.01, 2.0]),
        curve("b", 0, [3.0, 2.5, 2.019]),
        curve("a", 1, [3.0, 1.0, 1.5]),
        curve("b", 1, [3.0, 2.0, 1.1]),
    ]
    taken = {"forward": 100, "backward": 0, "learning_seconds": 0.1, "flops": 1e9}
    assert budget.reached(curves[0], 2.02) == taken
    assert budget.reached(curves[1], 2.0) is None
    head, rows = budget.table(curves)
    assert len(head) == len(rows[0]) == 9
    assert rows[0][:7] == ["a", "2 of 2", "100", "0", "0.1", "1 G", "100"]
    assert rows[1][:7] == ["b", "1 of 2", "-", "-", "-", "-", "-"]
    # The test loss where validation is best.
    assert rows[0][8].startswith("2.500")
    # A loss of 1.05 is 5 % above the best.
    curves[3]["validation_loss"][-1] = 1.05
    assert budget.table(curves)[1][1][:7] == ["b", "1 of 2", "-", "-", "-", "-", "200"]
    # Older results, and ways without a compiled step, have no FLOPs.
    for found in curves:
        del found["flops"]
    assert budget.table(curves)[1][0][:6] == ["a", "2 of 2", "100", "0", "0.1", "-"]


def test_the_command_keeps_its_curves_and_reports_them(tiny, tmp_path):
    words = ["--num-experts", "3", "--passes", "1500", "--ways", "Gauss-Newton, d", "SPSA, as"]
    words += ["--sharing", "softmax", "free by layer", *folder_options(tmp_path)]
    results = budget.main(words)
    assert {(found["sharing"], found["dimension"]) for found in results["curves"]} == {
        ("softmax", 2),
        ("free by layer", 3 * 5),
    }
    for found in results["curves"]:
        seconds = np.array(found["learning_seconds"])
        assert seconds[0] == 0
        assert (np.diff(seconds) > 0).all()
        assert found["forward"][-1] <= 1500
        assert len(found["validation_loss"]) == len(found["forward"])
        assert found["flops"][0] == 0
        assert (np.diff(found["flops"]) > 0).all()
    again = budget.main(words)
    assert again["curves"] == results["curves"]
    report = check_report(tmp_path / "out", again, "free-by-layer.png", "softmax.png")
    assert "## free by layer: 15 directions" in report
