"""One call from experts to a model: `build_prior`."""

import functools
import math
import pickle
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import glue_jax
from glue_jax.priors import from_data
from glue_jax.priors.stages import stage_groups
from tests.helpers import compilations
from tests.library.helpers import CLASSIFICATION, DATA, EXPERTS, Loader, classification, cross_entropy, network, squared

KEY = jax.random.key(0)
BANK, EXAMPLES = classification()
TRAIN, TEST = (jax.tree.map(lambda leaf, part=part: leaf[part], EXAMPLES) for part in (slice(160), slice(160, None)))


def error_rate(params, batch):
    return glue_jax.objectives.error_rate(network(params, batch), batch["y"])


def plain(params, batch):
    """The loss in one part."""
    return CLASSIFICATION(params, batch)


def build(experts=BANK, data=TRAIN, **words):
    return glue_jax.build_prior(KEY, experts, data, **({"loss_fn": CLASSIFICATION, "max_steps": 28} | words))


def values(prior):
    return {each.name: each.value for each in prior.candidates}


def test_the_one_right_expert_is_chosen_and_comes_back_as_it_is():
    # The others are wrong in the same way, so no blend has fewer errors than the right one.
    wrong = jnp.array([1.0, 0.0, 2.0, 3.0])
    experts = jax.tree.map(lambda leaf: leaf[:1] + jnp.expand_dims(wrong, (1, 2)) * jnp.abs(leaf[1:2]), BANK)
    right = jax.tree.map(lambda leaf: leaf[1], experts)
    data = {**TRAIN, "y": jnp.argmax(network(right, TRAIN), axis=1).astype(jnp.int32)}
    found = build(experts, data, validation_fn=error_rate)
    assert found.chosen == "expert 1"
    np.testing.assert_array_equal(found.alpha, [0, 1, 0, 0])
    chex.assert_trees_all_equal(found.params, right)
    assert found.groups is None
    assert "Chosen: expert 1, because its value is the lowest, 0." in found.report


@pytest.mark.parametrize("loss_fn", [CLASSIFICATION, plain], ids=["Gauss-Newton", "SPSA"])
def test_learning_beats_the_average_and_groups_beat_one_vector(loss_fn):
    found = build(loss_fn=loss_fn)
    value = values(found)
    assert value["learned"] < 0.9 * min(value["uniform average"], *(value[f"expert {i}"] for i in range(4)))
    assert value["learned by group"] < value["learned"]
    assert found.chosen == "learned by group"
    assert found.groups == ("first", "second")
    assert found.alpha.shape == (2, 4)
    rows = {"first": 0, "second": 1}
    chex.assert_trees_all_equal(found.params, glue_jax.blend(BANK, found.alpha, rows))
    assert float(CLASSIFICATION(found.params, TEST)) < float(
        CLASSIFICATION(glue_jax.blend(BANK, glue_jax.coefficients.uniform(4)), TEST)
    )


def test_the_values_are_those_of_the_validation_data_and_the_lowest_wins():
    found = build(validation_data=TEST, validation_fn=error_rate)
    for candidate in found.candidates:
        if candidate.alpha.ndim == 1:
            expected = error_rate(glue_jax.blend(BANK, candidate.alpha), TEST)
            np.testing.assert_allclose(candidate.value, expected, atol=1e-6)
    assert values(found)[found.chosen] == min(values(found).values())
    assert "those of validation_fn on the 80 examples of validation_data" in found.report


def test_a_fifth_of_the_data_is_held_out(monkeypatch):
    rows, seen = {**TRAIN, "row": jnp.arange(160)}, {}

    def learn(key, experts, data, **words):
        seen.update(learned=set(data["row"].tolist()), held_out=set(words["validation_data"]["row"].tolist()))
        return glue_jax.learn(key, experts, data, **words)

    monkeypatch.setattr(from_data, "learn", learn)
    found = build(data=rows, max_steps=1, groups=None)
    assert len(seen["held_out"]) == 32
    assert seen["learned"] == set(range(160)) - seen["held_out"]
    # They are drawn, and not the last ones.
    assert seen["held_out"] != set(range(128, 160))
    assert "on 32 of the 160 examples, which were held out" in found.report


def test_groups_may_be_given_or_left_out():
    groups = glue_jax.merging.group_by_path(BANK, str.upper)
    assert build(groups=groups).groups == ("FIRST", "SECOND")
    assert list(build(groups=None).stages) == ["learned"]


def test_a_merge_without_groups_learns_one_vector_and_the_report_says_so():
    def merge(experts, alpha):
        return jax.tree.map(lambda leaf: jnp.tensordot(alpha, leaf, axes=1), experts)

    found = build(merge_fn=merge, max_steps=10)
    assert list(found.stages) == ["learned"]
    assert "Nothing was learned by group, because merge_fn takes no `groups`" in found.report
    with pytest.raises(ValueError, match="merge_fn has no keyword groups"):
        build(merge_fn=merge, groups=glue_jax.merging.group_by_path(BANK, lambda path: "all"))


def test_experts_of_half_precision_give_a_model_of_half_precision():
    experts, data = classification(dtype=jnp.bfloat16)
    found = glue_jax.build_prior(KEY, experts, evaluate=lambda params: float(plain(params, data)), max_steps=3)
    assert found.chosen == "learned"
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {jnp.dtype(jnp.bfloat16)}


def test_a_second_call_gives_the_same_and_compiles_nothing(caplog):
    first = build()
    with compilations(caplog) as names:
        second = build()
    assert names == []
    chex.assert_trees_all_equal(first.alpha, second.alpha)
    assert first.report == second.report


# A function on the host.
TARGET = np.array([0.4, 0.3, 0.2, 0.1])


class Host:
    """The squared distance of the blend's weights, of which some calls fail."""

    def __init__(self, failing=()):
        self.calls, self.failing = 0, failing

    def __call__(self, params):
        assert isinstance(params["w"], jax.Array)
        self.calls += 1
        # In pairs, so that whole steps fail too.
        if self.calls in self.failing:
            raise RuntimeError("no answer")
        if self.calls + 1 in self.failing:
            return None
        return float(np.square(np.asarray(params["w"]) - TARGET).sum())


AXES = {"w": jnp.eye(4)}


def test_a_metric_on_the_host_is_learned_by_though_calls_fail_in_the_middle():
    # The experts and the average take 5 calls, the start takes 1, and each step takes 7.
    host = Host(failing=(8, 20, 22, 24, 26, 34, 50))
    found = glue_jax.build_prior(KEY, AXES, evaluate=host, max_steps=40, patience=None)
    assert found.chosen == "learned"
    assert values(found)["learned"] < 0.1 * values(found)["uniform average"]
    history = found.stages["learned"].history
    assert len(history.metrics.loss) == 40
    assert np.isnan(np.asarray(history.metrics.probe_losses)).any()
    assert sum(each.passes for each in found.candidates) == host.calls
    assert "steps of SPSA by calls of evaluate" in found.report


def test_an_expert_that_cannot_be_evaluated_loses_and_the_report_says_so():
    found = glue_jax.build_prior(KEY, AXES, evaluate=Host(failing=(1,)), max_steps=2)
    assert math.isnan(found.candidates[0].value)
    assert "the value is not finite: expert 0" in found.report


def test_if_nothing_can_be_evaluated_the_error_has_the_reason():
    host = Host(failing=range(100))
    with pytest.raises(ValueError, match="expected a finite number from evaluate") as caught:
        glue_jax.build_prior(KEY, AXES, evaluate=host)
    assert host.calls == 5
    assert isinstance(caught.value.__cause__, RuntimeError)


# Unrelated experts: one network, whose hidden units have other places in each.
LAYERS = ["first", "second"]


def shuffled(count=4, units=16):
    rng = np.random.default_rng(0)
    base = {"first": rng.normal(size=(6, units)), "second": rng.normal(size=(units, 3))}
    experts = []
    for _ in range(count):
        order = rng.permutation(units)
        noisy = {name: leaf + 0.5 * rng.normal(size=leaf.shape) for name, leaf in base.items()}
        experts.append({"first": noisy["first"][:, order], "second": noisy["second"][order]})
    x = rng.normal(size=(240, 6))
    y = np.argmax(np.tanh(x @ base["first"]) @ base["second"], axis=1)
    stacked = glue_jax.stack_experts(jax.tree.map(lambda leaf: leaf.astype(np.float32), experts))
    return stacked, {"x": x.astype(np.float32), "y": y.astype(np.int32)}


def test_unrelated_experts_with_a_spec_are_aligned_and_the_result_improves():
    experts, data = shuffled()
    spec = glue_jax.merging.chain_spec(jax.tree.map(lambda leaf: leaf[0], experts), LAYERS)
    without = build(experts, data, groups=None)
    found = build(experts, data, groups=None, spec=spec)
    assert without.permutations is None
    assert "No spec was given, so the experts were not aligned" in without.report
    assert found.similarity is not None
    assert not all(each.related for each in found.similarity)
    assert values(found)["aligned average"] < 0.6 * values(found)["uniform average"]
    assert values(found)[found.chosen] < values(without)[without.chosen]
    # The permutations and the coefficients are all that the model is made of.
    assert found.permutations is not None
    models = [jax.tree.map(lambda leaf, at=at: leaf[at], experts) for at in range(4)]
    moved = [glue_jax.merging.permute(*each) for each in zip(models, [spec] * 4, found.permutations, strict=True)]
    chex.assert_trees_all_equal(found.params, glue_jax.blend(glue_jax.stack_experts(moved), found.alpha))
    assert re.search(
        r"takes the value of their uniform average from .* to .*, so the aligned experts are", found.report
    )


def test_related_experts_are_not_aligned():
    experts, data = classification()
    spec = glue_jax.merging.chain_spec(jax.tree.map(lambda leaf: leaf[0], experts), LAYERS)
    found = build(experts, data, spec=spec, max_steps=5, groups=None)
    assert found.similarity is not None
    assert all(each.related for each in found.similarity)
    assert "aligned average" not in values(found)
    assert "The experts are related" in found.report
    assert "Related experts need no alignment, so none was tried" in found.report


def test_a_spec_that_does_not_describe_the_network_is_refused():
    experts, data = shuffled()
    wrong = {"second": (None, "classes")}
    with pytest.raises(ValueError, match="computes something else"):
        build(experts, data, spec=wrong)


def test_an_expert_that_is_unlike_the_others_is_named():
    rng = np.random.default_rng(1)
    base = rng.normal(size=(40, 40))
    rows = [base + 0.3 * rng.normal(size=base.shape) for _ in range(3)]
    experts = {"w": jnp.asarray(np.stack([*rows[:2], rng.normal(size=base.shape), rows[2]]), jnp.float32)}
    found = glue_jax.build_prior(KEY, experts, evaluate=lambda params: float(jnp.sum(params["w"])), max_steps=1)
    assert found.similarity is not None
    assert [each.related for each in found.similarity] == [True, True, False, True]
    assert "Expert 2 is an outlier" in found.report


def normed(params, x, statistics):
    """A hidden layer with BatchNorm."""
    hidden = (x @ params["first"] - statistics["mean"][None]) / jnp.sqrt(statistics["var"][None] + 1e-5)
    return jax.nn.relu(hidden) @ params["second"]


def statistics_fn(params, batch):
    hidden = batch["x"] @ params["first"]
    return {"mean": hidden.mean(axis=0), "var": hidden.var(axis=0)}


# In evaluation mode.
NORMED = glue_jax.OutputLoss(lambda params, batch: normed(params, batch["x"], params["batch_stats"]), cross_entropy)


def test_statistics_are_refreshed_before_a_candidate_is_validated():
    truth = {name: leaf[0] for name, leaf in BANK.items()}
    data = {**TRAIN, "y": jnp.argmax(normed(truth, TRAIN["x"], statistics_fn(truth, TRAIN)), 1).astype(jnp.int32)}
    # The experts' own statistics are far off.
    experts = {**BANK, "batch_stats": {"mean": jnp.full((4, 16), 100.0), "var": jnp.ones((4, 16))}}
    found = build(experts, data, loss_fn=NORMED, validation_data=data, statistics_fn=statistics_fn)
    assert [each.refreshed for each in found.candidates] == [False] * 4 + [True] * (len(found.candidates) - 4)
    # An expert is the user's own: it is judged with its own statistics.
    first = jax.tree.map(lambda leaf: leaf[0], experts)
    np.testing.assert_allclose(values(found)["expert 0"], NORMED(first, data), rtol=1e-4)
    assert "BatchNorm's statistics of each blend were refreshed on 160 examples of the data." in found.report
    chex.assert_trees_all_close(found.params["batch_stats"], statistics_fn(found.params, data), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values(found)[found.chosen], NORMED(found.params, data), rtol=1e-4)
    # The loss runs the network in evaluation mode, and is learned with the statistics of minibatches all the same.
    assert values(found)["learned by group"] < values(found)["learned"] < values(found)["uniform average"]
    assert values(found)["uniform average"] < NORMED(glue_jax.blend(experts, glue_jax.coefficients.uniform(4)), data)


def overflowing(params, batch):
    """Lower beyond every expert, where it then is no number."""
    w = params["w"]
    return jnp.where(w > 1.5, jnp.nan, -w) + 0 * jnp.mean(batch)


def test_a_stage_that_diverges_ends_and_what_it_found_before_counts():
    found = build(EXPERTS, DATA, loss_fn=overflowing, max_steps=200, validation_data=DATA, patience=None)
    by_name = {each.name: each for each in found.candidates}
    assert by_name["learned by group"].note is not None
    assert "Learning ended early" in found.report
    assert 1 < float(found.params["w"]) <= 1.5


def test_the_report_says_which_stage_lowered_nothing():
    # The average has what the validation data ask for, and the target data ask for something else.
    bank = {"w": jnp.array([2.0, -2.0])}
    report = build(bank, jnp.ones(50), loss_fn=squared, validation_data=jnp.zeros(50)).report
    assert report.count("The value is not below that of `uniform average`.") == 1
    assert report.count("The value is not below that of `learned`.") == 1
    assert "is not below" not in build().report


def test_a_candidate_without_a_finite_value_loses_and_the_report_says_so():
    def not_the_second(params, batch):
        is_second = jnp.abs(params["first"] - BANK["first"][1]).max() < 1e-6
        return jnp.where(is_second, jnp.nan, plain(params, batch))

    found = build(validation_fn=not_the_second)
    assert math.isnan(values(found)["expert 1"])
    assert "Not in the choice, because the value is not finite: expert 1." in found.report
    assert found.chosen == "learned by group"


class StoppedError(Exception):
    pass


def kept_until(count, call):
    """What a caller has kept when the call is stopped after a number of progresses."""
    kept, told = {}, []

    def keep(stage, progress):
        told.append(stage)
        kept[stage] = pickle.dumps(jax.device_get(progress.result))
        if len(told) == count:
            raise StoppedError

    with pytest.raises(StoppedError):
        call(on_progress=keep)
    return {stage: pickle.loads(data) for stage, data in kept.items()}


@pytest.mark.parametrize("loss_fn", [CLASSIFICATION, plain], ids=["Gauss-Newton", "SPSA"])
@pytest.mark.parametrize("count", [2, 8])
def test_a_call_goes_on_from_what_was_kept_as_if_it_had_never_stopped(loss_fn, count):
    words = {"loss_fn": loss_fn, "max_steps": 28, "patience": 4}
    whole = build(**words)
    known = kept_until(count, functools.partial(build, **words))
    assert len(known) == 1 + (count == 8)
    again = build(**words, known=known)
    chex.assert_trees_all_equal(again.stages, whole.stages)
    chex.assert_trees_all_equal(again.params, whole.params)
    assert again.report == whole.report
    # A finished call learns nothing more.
    done = build(**words, known=whole.stages, on_progress=lambda stage, progress: pytest.fail("a step was taken"))
    assert done.report == whole.report


def test_calls_on_the_host_go_on_from_what_was_kept():
    def call(**words):
        return glue_jax.build_prior(KEY, AXES, evaluate=Host(), max_steps=12, patience=None, **words)

    whole, known = call(), kept_until(5, call)
    chex.assert_trees_all_equal(call(known=known).stages, whole.stages)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            {"data": None, "loss_fn": None},
            ValueError,
            "data and loss_fn missing; expected data and loss_fn, or else eval",
        ),
        ({"loss_fn": None}, ValueError, "loss_fn missing"),
        ({"evaluate": Host()}, ValueError, "evaluate was given together with data, loss_fn; expected evaluate without"),
        ({"evaluate": 3, "data": None, "loss_fn": None}, TypeError, "evaluate is 3; expected a function"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn is 'mse'; expected a function"),
        ({"validation_fn": 1}, TypeError, "validation_fn is 1; expected a function"),
        (
            {"validation_fn": lambda params, batch: jnp.nan},
            ValueError,
            "expected a finite number from the validation function",
        ),
        ({"data": Loader([])}, TypeError, r"data is a Loader; expected arrays \[N"),
        (
            {"data": jax.tree.map(lambda leaf: leaf[:4], TRAIN)},
            ValueError,
            "data holds 4 examples; expected at least 5",
        ),
        ({"validation_data": {"x": TEST["x"]}}, ValueError, "validation_data"),
        ({"batch_size": 150}, ValueError, "batch_size is 150, but there are 128 examples to learn from"),
        ({"max_steps": 0}, ValueError, "max_steps is 0"),
        ({"patience": 0}, ValueError, "patience is 0"),
        ({"groups": "blocks"}, TypeError, "groups is 'blocks'; expected 'layers', None, or the Groups"),
        ({"groups": glue_jax.merging.group_by_path({"a": 0.0}, "a")}, ValueError, "groups does not fit"),
        ({"spec": {"third": ("a", None)}}, ValueError, "third"),
        ({"statistics_fn": 1}, TypeError, "statistics_fn is 1; expected a function"),
        ({"statistics_fn": network, "mean": "("}, ValueError, "mean is"),
        ({"on_progress": 1}, TypeError, "on_progress is 1; expected a function"),
        ({"experts": jax.tree.map(lambda leaf: leaf[:1], BANK)}, ValueError, "experts has K = 1; expected at least 2"),
        (
            {"experts": {**BANK, "first": BANK["first"].at[2].set(jnp.nan)}},
            ValueError,
            "expert 2 of experts holds nan at first",
        ),
        ({"known": {"learnt": None}}, ValueError, "known holds the stage 'learnt'; expected stages of this call"),
        ({"known": {"learned": 1}}, TypeError, r"known\['learned'\] is a int; expected a LearnResult"),
        ({"known": [1]}, TypeError, "known is a list; expected a mapping"),
    ],
)
def test_a_wrong_call_is_a_clear_error(words, error, message):
    with pytest.raises(error, match=message):
        build(**words)


def test_a_result_of_other_experts_is_refused():
    other = glue_jax.build_prior(KEY, AXES, evaluate=Host(), max_steps=1)
    with pytest.raises(ValueError, match=r"known\['learned'\] belongs to another call: its state has the shapes"):
        build(known={"learned": other.stages["learned"]})


def test_what_the_experts_share_reaches_the_merge_as_an_argument():
    def merge(experts, alpha, *, groups=None, min_dtype=None, shared: Any = None):
        # A constant of the program would be an array of NumPy or JAX.
        assert isinstance(shared["w"], Tracer) or not isinstance(alpha, Tracer)
        return {"w": shared["w"] + glue_jax.blend(experts, alpha, groups, min_dtype=min_dtype)["w"]}

    base = {"w": jnp.array([10.0, -10.0])}
    experts = glue_jax.stack_experts([{"w": jnp.array([0.0, 2.0])}, {"w": jnp.array([1.0, 0.0])}])
    x = jax.random.normal(jax.random.key(0), (200, 2))
    loss_fn = glue_jax.OutputLoss(
        lambda params, batch: batch["x"] @ params["w"], lambda out, batch: jnp.mean((out - batch["y"]) ** 2)
    )
    data = {"x": x, "y": x @ (base["w"] + jnp.array([0.25, 1.5]))}
    found = glue_jax.build_prior(KEY, experts, data, loss_fn=loss_fn, merge_fn=merge, shared=base, groups=None)
    chex.assert_trees_all_close(found.params["w"], base["w"] + jnp.array([0.25, 1.5]), atol=0.01)
    assert found.similarity is None


def test_tied_leaves_have_one_row_and_no_row_is_left_over():
    tied = {"embed": {"w": jnp.arange(12.0).reshape(3, 4)}, "head": {"w": jnp.arange(12.0).reshape(3, 4)}}
    experts = {**tied, "mid": {"w": jnp.ones((3, 4))}, "last": {"w": jnp.ones((3, 4))}}
    groups = stage_groups("layers", experts, glue_jax.blend)
    assert groups is not None
    rows = {name: groups.rows[name]["w"] for name in experts}
    assert rows["embed"] == rows["head"]
    assert len({rows["embed"], rows["mid"], rows["last"]}) == 3
    assert len(groups.names) == 3
    assert groups.names[rows["embed"]] == "embed"


@pytest.mark.parametrize("by_calls", [False, True])
def test_an_exception_has_the_stages_and_learning_goes_on(by_calls):
    experts, data = classification()

    def stop(stage, progress):
        if stage == ("learned" if by_calls else "learned by group"):
            raise KeyboardInterrupt

    def loss(params):
        return float(CLASSIFICATION(params, data))

    given: dict[str, Any] = {"evaluate": loss} if by_calls else {"data": data, "loss_fn": CLASSIFICATION}
    with pytest.raises(KeyboardInterrupt) as raised:
        glue_jax.build_prior(jax.random.key(0), experts, **given, max_steps=10, on_progress=stop)
    stages = raised.value.stages  # pyright: ignore[reportAttributeAccessIssue]
    assert list(stages) == (["learned"] if by_calls else ["learned", "learned by group"])
    whole = glue_jax.build_prior(jax.random.key(0), experts, **given, max_steps=10)
    rest = glue_jax.build_prior(jax.random.key(0), experts, **given, max_steps=10, known=stages)
    assert np.array_equal(whole.alpha, rest.alpha)
