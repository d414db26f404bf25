"""The planner: its figures agree among themselves, and what cannot run is left out with the reason."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from glue_jax import planning, theory, timing
from glue_jax.timing import Program, compile_and_run
from tests.library.helpers import cross_entropy, forward_only, refuse

K, FEATURES, CLASSES, EXAMPLES = 4, 5, 3, 12
D = K - 1


@pytest.fixture(scope="module")
def problem():
    """K linear classifiers with a leaf that counts, and a minibatch."""
    rng = np.random.default_rng(0)
    experts = {"w": rng.normal(size=(K, FEATURES, CLASSES)).astype(np.float32), "seen": np.ones((K,), np.int32)}
    x = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    return experts, {"x": x, "y": rng.integers(0, CLASSES, size=EXAMPLES)}


def outputs_fn(params, batch):
    return jnp.matmul(batch["x"], params["w"], precision="highest")


LOSS = glue_jax.OutputLoss(outputs_fn, cross_entropy)


def plain_loss(params, batch):
    return LOSS(params, batch)


SECONDS = {
    "forward": 1.0,
    "backward": 3.5,
    "blend": 0.5,
    "inner_products": 0.25,
    "full_gradient_step": 5.0,
    "spsa_step": 7.0,
    "forward_gradient_step": 6.0,
    "gauss_newton_step": 8.0,
}


@pytest.fixture
def clock(monkeypatch):
    """Compiles nothing, and gives each program, by its name, the seconds of a table that a test may change."""
    table = dict(SECONDS)
    compiled: Any = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(temp_size_in_bytes=1000))

    def compile_and_run(name, function, *arguments):
        step_metrics = types.SimpleNamespace(gradient_norm=1.0)
        result = (None, step_metrics) if name.endswith("_step") else function(*arguments)
        return Program(name, compiled, arguments, result)

    monkeypatch.setattr(planning, "compile_and_run", compile_and_run)
    monkeypatch.setattr(timing, "_run", lambda program: None)
    monkeypatch.setattr(timing, "_seconds", lambda program: table[program.name])
    return table


@pytest.fixture
def traced(clock, monkeypatch):
    """Only traces the programs, which is where JAX says that there is no derivative."""
    instant = planning.compile_and_run

    def compile_and_run(name, function, *arguments):
        try:
            jax.eval_shape(function, *arguments)
        except Exception as error:
            return f"{type(error).__name__}: {timing._first_line(error)}"
        return instant(name, function if name in ("blend", "forward") else lambda *_: None, *arguments)

    monkeypatch.setattr(planning, "compile_and_run", compile_and_run)
    monkeypatch.setattr(planning, "_sizes", lambda count: [1])


def kinds(steps):
    return {step.name for step in steps}


def the(steps, name, probe_batch_size):
    return next(step for step in steps if (step.name, step.probe_batch_size) == (name, probe_batch_size))


def test_the_figures_follow_from_the_seconds(problem, clock):
    found = glue_jax.plan(*problem, loss_fn=LOSS)
    assert (found.forward, found.blend, found.backward_ratio, found.inner_products) == (1.0, 0.5, 2.5, 0.25)
    # 0.5 < (2.5 - 1) 1 + 0.25
    assert found.spsa_is_cheaper is True
    assert found.dimension == D
    assert not found.left_out
    for step in found.steps:
        assert step.temporary_bytes == 1000
        assert step.progress_seconds == step.steps * step.seconds
    one, all_directions = the(found.steps, "SPSA, 1 direction", 1), the(found.steps, "SPSA, 3 directions", 2 * D)
    # One direction has the error d - 1, d orthogonal ones have none.
    assert (one.steps, one.progress_seconds) == (D, 7.0 * D)
    assert all_directions.steps == 1
    assert found.best == min(found.steps, key=lambda step: step.progress_seconds)
    assert found.best.name == "full gradient"


def test_eq_10_turns_with_the_price_of_a_blend(problem, clock):
    for price, cheaper in ((1.74, True), (1.76, False)):
        clock["blend"] = price
        found = glue_jax.plan(*problem, loss_fn=plain_loss)
        assert found.spsa_is_cheaper is cheaper
        assert found.spsa_is_cheaper == (
            theory.spsa_cost(1.0, price) < theory.full_gradient_cost(1.0, 2.5, price, 0.25)
        )
        assert ("does not hold" in str(found)) is not cheaper


def test_the_best_step_is_the_cheapest_whichever_that_is(problem, clock):
    expected = {
        "full_gradient_step": "full gradient",
        "spsa_step": "SPSA, 3 directions",
        "forward_gradient_step": "forward gradient, 3 directions",
        "gauss_newton_step": "Gauss-Newton by differences",
    }
    for function, name in expected.items():
        before, clock[function] = clock[function], 0.1
        found = glue_jax.plan(*problem, loss_fn=LOSS)
        assert found.best.name == name
        assert f"Cheapest: {name}" in str(found)
        clock[function] = before


def test_passes_are_those_of_each_step(problem, clock):
    steps = glue_jax.plan(*problem, loss_fn=LOSS).steps

    def passes(name, size):
        step = the(steps, name, size)
        return step.forward_passes, step.tangents, step.backward_passes

    assert passes("full gradient", None) == (1, 0, 1)
    assert passes("SPSA, 1 direction", 2) == (2, 0, 0)
    assert passes("SPSA, 3 directions", 1) == (2 * D, 0, 0)
    assert passes("Gauss-Newton by differences", 1) == (D + 2, 0, 0)
    # Tangents that are computed together share a forward pass.
    assert passes("forward gradient, 3 directions", D) == (1, D, 0)
    assert passes("forward gradient, 3 directions", 2) == (2, D, 0)
    assert passes("Gauss-Newton in forward mode", D) == (2, D, 0)
    assert passes("Gauss-Newton in forward mode", 1) == (1 + D, D, 0)


def test_the_recommended_step_learns_as_it_is(problem, clock):
    experts, batch = problem
    for function, optimizer in (("spsa_step", optax.adam(0.1)), ("gauss_newton_step", None)):
        clock.update(SECONDS)
        clock[function] = 0.1
        best = glue_jax.plan(experts, batch, loss_fn=LOSS).best
        result = glue_jax.learn(
            jax.random.key(0),
            jax.tree.map(jnp.asarray, experts),
            batch,
            loss_fn=LOSS,
            optimizer=optimizer,
            step_fn=best.step_fn,
            batch_size=EXAMPLES,
            max_steps=4,
        )
        assert result.history.metrics.loss[-1] < result.history.metrics.loss[0]


@pytest.mark.parametrize(("seconds", "worth"), [(8.0, 1.6), (0.5, 0.1)])
def test_the_printed_plan_says_from_which_worth_on_gauss_newton_is_the_cheapest(problem, clock, seconds, worth):
    clock["gauss_newton_step"] = seconds
    text = str(glue_jax.plan(*problem, loss_fn=LOSS))
    # Its seconds against the 5 of the full gradient.
    assert (
        f"worth more than {worth} gradient steps, Gauss-Newton by differences with probe_batch_size=1 is the cheapest. "
        "Otherwise full gradient is." in text
    )
    table = [line for line in text.splitlines() if line.startswith(("Gauss-Newton by", "full gradient"))]
    assert [row.split()[-2:] for row in table] == [[f"{cost:g}"] * 2 for cost in sorted([5, seconds])]
    assert "nan" not in text


def test_without_an_output_loss_there_is_no_gauss_newton(problem, clock):
    found = glue_jax.plan(*problem, loss_fn=plain_loss)
    assert kinds(found.steps) == {
        "full gradient",
        "SPSA, 1 direction",
        "SPSA, 3 directions",
        "forward gradient, 3 directions",
    }
    assert not found.left_out
    assert "Gauss-Newton" not in str(found)


def test_a_loss_without_derivatives_keeps_spsa_and_gives_the_reason(problem, traced):
    # JAX differentiates a custom_vjp neither in reverse, by this rule, nor in forward mode.
    loss_fn = glue_jax.OutputLoss(lambda params, batch: forward_only(outputs_fn(params, batch)), cross_entropy)
    found = glue_jax.plan(*problem, loss_fn=loss_fn)
    assert kinds(found.steps) == {"SPSA, 1 direction", "SPSA, 3 directions", "Gauss-Newton by differences"}
    reason = next(step.reason for step in found.left_out if step.name == "full gradient")
    assert reason == "NotImplementedError: no reverse derivative"
    assert kinds(found.left_out) >= {"forward gradient, 3 directions", "Gauss-Newton in forward mode"}
    assert (found.backward_ratio, found.inner_products, found.spsa_is_cheaper) == (None, None, None)
    assert "Left out: full gradient: NotImplementedError: no reverse derivative" in str(found)
    assert "Eq. (10) has no answer" in str(found)


def test_a_loss_with_forward_mode_alone_drops_the_full_gradient(problem, traced):
    def loss_fn(params, batch):
        # A loop whose number of steps is not known has no reverse derivative.
        loss = plain_loss(params, batch)
        return jax.lax.while_loop(lambda carry: carry[0] < 1, lambda carry: (carry[0] + 1, carry[1] * 1.0), (0, loss))[
            1
        ]

    found = glue_jax.plan(*problem, loss_fn=loss_fn)
    assert kinds(found.left_out) == {"full gradient"}
    assert "forward gradient, 3 directions" in kinds(found.steps)
    assert found.spsa_is_cheaper is None


def test_a_step_whose_gradient_is_0_is_left_out(problem, clock, monkeypatch):
    instant = planning.compile_and_run

    def compile_and_run(name, function, *arguments):
        program = instant(name, function, *arguments)
        if isinstance(program, str) or not name.endswith("_step"):
            return program
        return program._replace(result=(None, types.SimpleNamespace(gradient_norm=0.0)))

    monkeypatch.setattr(planning, "compile_and_run", compile_and_run)
    found = glue_jax.plan(*problem, loss_fn=LOSS)
    assert kinds(found.steps) == {"SPSA, 1 direction", "SPSA, 3 directions"}
    assert "norm 0" in next(step.reason for step in found.left_out if step.name == "full gradient")
    assert found.spsa_is_cheaper is None


def test_differences_of_short_floats_are_left_out(problem, traced):
    def short_outputs(params, batch):
        return (batch["x"].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32)

    with pytest.warns(UserWarning, match="bfloat16"):
        found = glue_jax.plan(*problem, loss_fn=glue_jax.OutputLoss(short_outputs, cross_entropy))
    assert {step.name for step in found.left_out} == {"Gauss-Newton by differences"}
    assert "Gauss-Newton in forward mode" in kinds(found.steps)


def test_what_does_not_fit_into_the_free_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(timing, "_free_bytes", lambda program: -1)
    assert "GB are free" in compile_and_run("any", jnp.sin, jnp.ones(3))


def test_what_the_allocator_refuses_is_a_reason_and_not_an_error(monkeypatch):
    monkeypatch.setattr(timing, "_free_bytes", lambda program: None)
    program = compile_and_run("big", lambda x: jnp.sort(x + jnp.arange(2**44, dtype=jnp.float32))[0], jnp.ones(()))
    assert isinstance(program, str)
    assert "RESOURCE_EXHAUSTED" in program


def test_what_is_raised_while_tracing_is_a_reason_of_one_line():
    reason = compile_and_run("raises", refuse, jnp.ones(3))
    assert reason == "NotImplementedError: no reverse derivative"


def test_where_no_step_runs_the_error_says_why(problem, clock, monkeypatch):
    def loss_fn(params, batch):
        return plain_loss(params, batch)

    monkeypatch.setattr("glue_jax.planning._step_program", lambda *_: "no memory")
    with pytest.raises(ValueError, match=r"no step runs here:\nLeft out: full gradient: no memory"):
        glue_jax.plan(*problem, loss_fn=loss_fn)


def test_free_coefficients_have_k_dimensions_and_two_experts_one(problem, clock):
    experts, batch = problem
    free = glue_jax.plan(experts, batch, loss_fn=plain_loss, link_fn=glue_jax.unconstrained)
    assert free.dimension == K
    assert "SPSA, 4 directions" in kinds(free.steps)
    two = glue_jax.plan(jax.tree.map(lambda leaf: leaf[:2], experts), batch, loss_fn=plain_loss)
    assert two.dimension == 1
    # One direction is all of them, and is named once.
    assert [step.name for step in two.steps if step.name.startswith("SPSA")] == ["SPSA, 1 direction"] * 2
    assert {step.steps for step in two.steps} == {1}


def test_a_state_and_a_merge_of_its_own_are_planned_for(problem, clock):
    experts, batch = problem
    groups = {"w": 0, "seen": 1}
    state = glue_jax.init(K, beta=jnp.zeros((2, K)))
    merge_fn = functools.partial(glue_jax.blend, groups=groups)
    found = glue_jax.plan(experts, batch, loss_fn=LOSS, state=state, merge_fn=merge_fn)
    assert found.dimension == 2 * (K - 1)
    assert "Gauss-Newton by differences" in kinds(found.steps)


def test_the_clock_is_read_as_often_as_asked_and_the_median_counts(problem, clock, monkeypatch):
    asked = []

    def seconds(program):
        asked.append(program.name)
        return [1.0, 100.0, 2.0][asked.count(program.name) - 1] if program.name == "forward" else 1.0

    monkeypatch.setattr(timing, "_seconds", seconds)
    found = glue_jax.plan(*problem, loss_fn=plain_loss, repeats=3)
    assert found.forward == 2.0
    # They take turns.
    assert asked[: len(asked) // 3] == asked[len(asked) // 3 : 2 * len(asked) // 3]
    assert asked.count("full_gradient_step") == 3


def test_a_metric_that_counts_is_planned_with_spsa_alone_by_the_real_clock(problem, monkeypatch):
    monkeypatch.setattr(planning, "_sizes", lambda count: [count])
    experts, batch = problem
    experts = jax.tree.map(lambda leaf: leaf[:2], experts)

    def loss_fn(params, batch):
        return glue_jax.objectives.error_rate(outputs_fn(params, batch), batch["y"])

    found = glue_jax.plan(experts, batch, loss_fn=loss_fn, repeats=1)
    assert kinds(found.steps) == {"SPSA, 1 direction"}
    assert kinds(found.left_out) == {"full gradient", "forward gradient, 1 direction"}
    assert found.best.seconds > 0
    assert (found.best.temporary_bytes or 0) > 0
    assert found.forward > 0
    assert found.blend > 0
    assert found.spsa_is_cheaper is None


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        ({"loss_fn": None}, TypeError, "loss_fn is None"),
        ({"repeats": 0}, ValueError, "repeats is 0"),
        ({"state": 3}, TypeError, "state is a int"),
        ({"state": glue_jax.init(K + 1)}, ValueError, "alpha has shape"),
        ({"loss_fn": lambda params, batch: params["w"]}, ValueError, "expected one real scalar"),
        ({"loss_fn": lambda params, batch: jnp.sum(params["w"]) * jnp.nan}, ValueError, "returned nan"),
        ({"experts": {"w": jnp.ones((1, 2))}}, ValueError, "nothing to probe"),
        ({"experts": {"w": jnp.ones(())}}, ValueError, "not stacked"),
    ],
)
def test_bad_input_is_refused_before_anything_is_timed(problem, monkeypatch, words, error, match):
    monkeypatch.setattr(timing, "_seconds", lambda program: pytest.fail("timed"))
    given = {"experts": problem[0], "batch": problem[1], "loss_fn": plain_loss, **words}
    with pytest.raises(error, match=match):
        glue_jax.plan(given.pop("experts"), given.pop("batch"), **given)


def test_a_call_under_jit_is_refused(problem):
    with pytest.raises(TypeError, match="outside"):
        jax.jit(lambda experts: glue_jax.plan(experts, problem[1], loss_fn=plain_loss))(problem[0])
