import dataclasses
from types import SimpleNamespace

import pytest

from experiments.protocol import estimate
from experiments.protocol import run as protocol
from experiments.protocol.expert_training import missing_experts
from tests.experiments.helpers import ONE_SEED, TINY, prepare_quietly
from tests.helpers import compilations


@pytest.fixture
def steady(monkeypatch):
    """A machine where a step of training takes 1 s, of coefficients 10 s, and a hundred images' evaluation 1 s."""
    monkeypatch.setattr(estimate, "_training_step", lambda *_: 1.0)
    monkeypatch.setattr(estimate, "_alpha_step", lambda *_: 10.0)
    monkeypatch.setattr(estimate, "_second_call", lambda _: TINY.validation_examples / 100)


def test_a_fresh_run_is_the_sum_of_its_steps(digits, tmp_path, steady):
    seconds = estimate.estimate(prepare_quietly(ONE_SEED, digits, tmp_path))
    # 2 experts of 2 epochs of 3 steps, measured on 20 validation, 64 target and 30 test images each.
    assert seconds["experts"] == pytest.approx(2 * 2 * 3 * 1 + 2 * (20 + 64 + 30) / 100)
    # 5 steps, validated on 20 images: Configs 3 and 4 at step 0, 2, 4, 5, Config 5 at step 0, 5.
    assert seconds["coefficients, at most"] == pytest.approx(3 * 5 * 10 + (4 + 4 + 2) * 20 / 100)
    # 5 Configs of 2 epochs of 2 steps and a test on 30 images.
    assert seconds["fine-tuning"] == pytest.approx(5 * 2 * (2 * 1 + 30 / 100))


def test_a_step_of_the_coefficients_is_measured_once_a_config_and_without_validation(digits, tmp_path, monkeypatch):
    measured = []

    def learn(context, number, key, experts, target, validation, *, max_steps, **_):
        assert validation is None
        measured.append(number)
        return SimpleNamespace(alpha=max_steps)

    monkeypatch.setattr(estimate, "learn_coefficients", learn)
    estimate.estimate(prepare_quietly(TINY, digits, tmp_path))
    # Two seeds; the first call of each compiles.
    assert sorted(measured) == [3, 3, 4, 4, 5, 5]


def test_a_step_is_what_a_call_takes_once_it_is_compiled(monkeypatch):
    seconds = iter([0.0, 7.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(seconds))
    calls = []
    assert estimate._second_call(lambda: calls.append(None)) == 7
    assert len(calls) == 2


def test_neither_estimate_nor_run_compiles_a_step_twice(digits, tmp_path, caplog):
    # Of the same numbers, training and fine-tuning are one program on a CPU.
    config = dataclasses.replace(ONE_SEED, fine_tuning_batch_size=ONE_SEED.expert_batch_size)
    # No other test has compiled programs for these images.
    train = digits.train._replace(images=255 - digits.train.images)
    with compilations(caplog) as names:
        context = prepare_quietly(config, digits._replace(train=train), tmp_path)
        estimate.estimate(context)
        protocol.run(context)
    assert names.count("jit(steps)") == 1
    # One for each of Configs 3, 4 and 5.
    assert names.count("jit(_run_step)") == 3
    assert names.count("jit(_validate)") == 1
    # One for each number of images: validation, target, test.
    assert names.count("jit(measures)") == 3


def test_what_is_done_is_not_counted(digits, tmp_path, steady):
    context = prepare_quietly(ONE_SEED, digits, tmp_path)
    protocol.run(context)
    assert not missing_experts(context)
    assert estimate.estimate(context) == {}
    two_seeds = prepare_quietly(TINY, digits, tmp_path)
    assert protocol.remaining(two_seeds) == {"coefficients": [3, 4, 5], "fine-tuning": [1, 2, 3, 4, 5]}
    assert estimate.estimate(two_seeds).keys() == {"coefficients, at most", "fine-tuning"}


@pytest.mark.parametrize("together", [False, True])
def test_steps_are_measured_as_they_run(digits, tmp_path, monkeypatch, together):
    if together:
        for module in ("context", "estimate"):
            monkeypatch.setattr(f"experiments.protocol.{module}.on_cpu", lambda tree: False)
    seconds = estimate.estimate(prepare_quietly(ONE_SEED, digits, tmp_path))
    assert len(seconds) == 3
    assert all(0 < value < 60 for value in seconds.values())
    # Nothing is kept of it.
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5 s"), (89.0, "89 s"), (90.0, "2 min"), (5000.0, "83 min"), (9000.0, "2.5 h")]
)
def test_a_time_is_said_in_the_unit_that_suits_it(seconds, text):
    assert estimate.duration(seconds) == text


def test_a_run_with_nothing_left_says_so():
    assert "nothing is left to do" in estimate.describe({})
    assert estimate.describe({"experts": 100.0, "fine-tuning": 20.0}).startswith(
        "time, from a few steps measured here: 2 min (experts 2 min, fine-tuning 20 s)"
    )


def test_experts_of_separate_initialisations_have_an_estimate(digits, tmp_path):
    context = prepare_quietly(dataclasses.replace(ONE_SEED, initialization="separate"), digits, tmp_path)
    found = estimate.estimate(context)
    assert list(found) == ["experts", "coefficients, at most", "fine-tuning"]
    assert min(found.values()) > 0
