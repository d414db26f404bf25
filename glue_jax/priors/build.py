"""`build_prior`: one model from K experts in one call, and a report that says why it is this one."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from glue_jax import arguments
from glue_jax.blending import blend
from glue_jax.checks import check_callable, check_counts
from glue_jax.coefficients import uniform
from glue_jax.experts import num_experts
from glue_jax.links import unconstrained
from glue_jax.merging.alignment import Permutations, align_experts
from glue_jax.merging.batch_norm import STATISTICS
from glue_jax.merging.groups import Groups
from glue_jax.merging.permutation_specs import Layout, PermutationSpec
from glue_jax.objectives import OutputLoss
from glue_jax.paths import check_finite
from glue_jax.priors import report as reporting
from glue_jax.priors.from_calls import FromCalls
from glue_jax.priors.from_data import FromData, Statistics, from_data
from glue_jax.priors.report import Candidate, Relation
from glue_jax.priors.stages import Stage, by_group, stage_groups, with_shared
from glue_jax.types import Batch, LearnResult, LossFn, MergeFn, Params, Progress, PyTree

# The key is folded with these numbers, so that no two uses share random numbers.
_HELD_OUT, _REFRESHED, _LEARNED = range(3)
LEARNED, BY_GROUP = "learned", "learned by group"
"""The names of the stages, and of their candidates."""


class Prior(NamedTuple):
    """The result of `build_prior`.

    Attributes:
        params: the model, in the experts' dtypes. Refreshed statistics have the dtypes of `statistics_fn`.
        alpha: its coefficients, float32 `[K]`, or `[G, K]` if they were learned by group.
        groups: the names of the G groups, or None if `alpha` is `[K]`.
        chosen: the name of the chosen candidate.
        candidates: all candidates. Those of the K experts come first.
        similarity: how each expert is related to the others. None if `merge_fn` is not `blend` and there is no `spec`,
            because cosines between the leaves then say nothing.
        permutations: the permutations of each expert, if the model is a blend of aligned experts. `permute` applies
            them. None if the experts were not aligned.
        stages: the result of each stage by its name, as `known` takes them.
        report: what was done and why, Markdown.
    """

    params: Params
    alpha: jax.Array
    groups: tuple[str, ...] | None
    chosen: str
    candidates: tuple[Candidate, ...]
    similarity: tuple[Relation, ...] | None
    permutations: list[Permutations] | None
    stages: Mapping[str, LearnResult]
    report: str


def build_prior(
    key: jax.Array,
    experts: Params,
    data: Batch | None = None,
    *,
    loss_fn: LossFn | None = None,
    validation_data: Batch | None = None,
    validation_fn: LossFn | None = None,
    evaluate: Callable[[Params], float | None] | None = None,
    spec: PermutationSpec | None = None,
    statistics_fn: Callable[[Params, Batch], PyTree] | None = None,
    collection: str = STATISTICS,
    mean: str = "mean$",
    var: str = "var$",
    groups: Groups | Literal["layers"] | None = "layers",
    merge_fn: MergeFn = blend,
    shared: PyTree | None = None,
    max_steps: int = 200,
    batch_size: int | None = None,
    patience: int | None = arguments.PATIENCE,
    on_progress: Callable[[str, Progress], object] | None = None,
    known: Mapping[str, LearnResult] | None = None,
) -> Prior:
    """Builds one model from K experts: makes several candidates, validates them, and returns the best.

    The candidates are each expert alone, the uniform average, and the blends that two stages learn. If the experts were
    aligned, the uniform average of the aligned experts is one more. The stages are:

    - `learned`: K coefficients under a softmax. They start at the uniform average.
    - `learned by group`: coefficients for each group, without a softmax. They start at the coefficients of the first
      stage.

    Neither stage takes a backward pass. They learn by Gauss-Newton if `loss_fn` is an `OutputLoss`, and otherwise by
    SPSA with Adam. The candidate with the lowest validation value is chosen. The value of this candidate looks better
    than it is, because the validation data chose it. So judge the model on other data.

    If an exception ends the call while it learns, Ctrl-C included, the exception's attribute `stages` holds the results
    so far. Pass them as `known`, and learning continues.

    Args:
        key: a `jax.random.key`. The same key and arguments give the same result.
        experts: stacked experts, each leaf `[K, ...]`, K at least 2.
        data: the target data: arrays `[N, ...]`, in a pytree.
        loss_fn: `loss_fn(params, batch) -> scalar`, the mean over a batch. Learning lowers it.
        validation_data: arrays `[M, ...]` that choose the candidate. With None, a fifth of `data` is held out: the last
            rows after a permutation by the key.
        validation_fn: `validation_fn(params, batch) -> scalar`, the mean over a batch, such as the error rate. Lower is
            better. With None it is `loss_fn`.
        evaluate: a function on the host in place of `data` and `loss_fn`: `evaluate(params) -> float`, lower is better.
            JAX does not trace it. With `evaluate` there is only the stage `learned`, which learns by `ask` and `tell`.
            If `evaluate` returns None or raises, learning continues without this blend.
        spec: which units may be permuted. The experts are aligned only if one of them is unrelated to the others: the
            median cosine between its weights and theirs is below 0.1 (see `Relation`). The alignment is kept if it
            lowers the value of the uniform average. With None, no expert is aligned.
        statistics_fn: `statistics_fn(params, batch)` returns BatchNorm's statistics of a batch of `data`, as for
            `refresh_statistics`. The statistics of each blend are refreshed on at most 2048 examples. An expert alone
            keeps its own statistics. While the coefficients are learned, a model has the statistics of the minibatch.
            With None, no statistics are refreshed.
        collection: as for `refresh_statistics`.
        mean: as for `refresh_statistics`.
        var: as for `refresh_statistics`.
        groups: the groups of the second stage. `layers` is `by_layer`, or a group for each leaf if no path names a
            layer. With `layers`, two leaves that are equal to each other in every expert, such as tied weights, share
            one group. An array does not count as tied if all its entries, in all experts, are the same number, such as
            0. If `groups` is None, there is no second stage. Nor is there one if `groups` is `layers` and `merge_fn`
            has no keyword `groups`.
        merge_fn: `merge_fn(experts, alpha) -> params`.
        shared: arrays that all blends share, such as the base of adapters. They are passed to `merge_fn` as its keyword
            `shared`, next to `groups` and `min_dtype`. With None, nothing is passed.
        max_steps: the largest number of steps of a stage.
        batch_size: the number of examples in a minibatch. With None it is 64, or all if there are fewer.
        patience: a stage ends after this many validations without a new best value. With None, all steps are taken.
        on_progress: `on_progress(stage, progress)`, called after every 5 steps and after the last step. With `evaluate`
            it is called after each step. You can keep `progress.result` of each stage, and pass them in `known` later.
        known: the results of an earlier call with the same arguments, by the names of their stages. Learning continues
            from them as if it had never stopped.

    Returns:
        The model, its coefficients, all candidates, and the report.

    Raises:
        ValueError: before any work, if an argument is out of its range, if arguments do not go together, if a result in
            `known` belongs to another stage, or if weights are infinite or NaN.
        ValueError: if no expert and no average of them has a finite value.
        ValueError: if an aligned expert computes another function than before, because the spec is wrong. This is
            checked if `loss_fn` is an `OutputLoss` and `merge_fn` is `blend`.
        TypeError: if an argument has the wrong type.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.array([0.0, 2.0])}, {"w": jnp.array([1.0, 0.0])}])
        >>> x = jax.random.normal(jax.random.key(0), (200, 2))
        >>> loss_fn = glue_jax.OutputLoss(
        ...     lambda params, batch: batch["x"] @ params["w"], lambda out, batch: jnp.mean((out - batch["y"]) ** 2)
        ... )
        >>> data = {"x": x, "y": x @ jnp.array([0.25, 1.5])}
        >>> prior = glue_jax.build_prior(jax.random.key(1), experts, data, loss_fn=loss_fn)
        >>> bool(jnp.abs(prior.params["w"] - jnp.array([0.25, 1.5])).max() < 0.01)
        True
    """
    known = {} if known is None else known
    arguments.check_key_and_trees(key, experts, data, validation_data)
    k = num_experts(experts)
    if k < 2:
        raise ValueError(f"experts has K = {k}; expected at least 2 experts")
    check_finite("experts", experts, stacked=True)
    experts = jax.tree.map(jnp.asarray, experts)
    check_counts(max_steps=max_steps, **({} if patience is None else {"patience": patience}))
    check_callable(merge_fn=merge_fn, **({} if on_progress is None else {"on_progress": on_progress}))
    if spec is not None:
        Layout(spec, jax.tree.map(lambda leaf: leaf[0], experts))
    given: dict[str, Any] = {
        "data": data,
        "loss_fn": loss_fn,
        "validation_data": validation_data,
        "validation_fn": validation_fn,
        "batch_size": batch_size,
        "statistics": None if statistics_fn is None else Statistics(statistics_fn, collection, mean, var),
    }
    if evaluate is None:
        source = from_data(jax.random.fold_in(key, _HELD_OUT), **given, max_steps=max_steps, patience=patience)
    else:
        _check_alone(evaluate, {**given, "groups": None if groups == "layers" else groups})
        source = FromCalls(evaluate=evaluate, max_steps=max_steps, patience=patience)
    is_average = arguments.bare(merge_fn) is blend
    given_merge: Any = merge_fn
    one = merge_fn if shared is None else functools.partial(given_merge, shared=shared)
    found = stage_groups(groups, experts, one) if evaluate is None else None
    merge_fn = merge_fn if shared is None else with_shared(merge_fn)
    stages = [Stage(LEARNED, (k,), jax.nn.softmax, merge_fn)]
    if found is not None:
        stages.append(Stage(BY_GROUP, (len(found.names), k), unconstrained, by_group(merge_fn, found)))
    _check_known(known, stages, source)
    similarity = reporting.relations(experts) if is_average or spec is not None else None
    candidates: list[Candidate] = []

    def together(experts: Params) -> Params:
        return experts if shared is None else (experts, shared)

    def model(experts: Params, alpha: jax.Array, refreshed: bool) -> Params:
        params = stages[alpha.ndim - 1].merge_fn(together(experts), alpha)
        return source.finished(jax.random.fold_in(key, _REFRESHED), params) if refreshed else params

    def judge(name: str, experts: Params, alpha: jax.Array, passes: int = 0, note: str | None = None) -> Candidate:
        # An expert is judged as it is: its statistics are those of its own data.
        refreshed = statistics_fn is not None and len(candidates) >= k
        value = source.value(model(experts, alpha, refreshed))
        passes += source.passes_of_value(refreshed)
        candidates.append(Candidate(name, alpha, value, passes, refreshed, note))
        return candidates[-1]

    for index in range(k):
        judge(f"expert {index}", experts, jnp.zeros(k).at[index].set(1))
    average = before = judge("uniform average", experts, uniform(k))
    are_related = similarity is None or all(each.related for each in similarity)
    originals = experts
    permutations, alignment = None, "" if similarity is None else _not_aligned(spec, are_related)
    if spec is not None and not are_related:
        aligned = align_experts(experts, spec, reference=None, check_fn=_check_fn(source, merge_fn))
        after = judge("aligned average", aligned.experts, uniform(k))
        is_better = _order(after) < _order(average)
        if is_better:
            before, (experts, permutations) = after, aligned
        alignment = (
            f"Aligning the experts takes the value of their uniform average from {average.value:.4g} to "
            f"{after.value:.4g}, so {'the aligned experts' if is_better else 'the experts as they were'} are blended."
        )
    if not any(math.isfinite(each.value) for each in candidates):
        values = [each.value for each in candidates]
        raise ValueError(
            f"the experts and their average have the values {values}; expected a finite number from "
            f"{source.name_of_value}{source.advice}"
        ) from source.failure
    results, words = {}, []
    for number, stage in enumerate(stages):
        start = known.get(stage.name) or stage.first_state(
            results[LEARNED].alpha if number else None, source.optimizer(stage)
        )
        try:
            result, note = source.learned(
                jax.random.fold_in(key, _LEARNED + number),
                together(experts),
                stage,
                start,
                functools.partial(_tell, on_progress, stage.name),
            )
            results[stage.name] = result
            learned = judge(stage.name, experts, result.alpha, source.passes(stage, result), note)
        except BaseException as error:
            so_far = getattr(error, "result", None)
            error.stages = {**known, **results} | (  # pyright: ignore[reportAttributeAccessIssue]
                {stage.name: so_far} if so_far else {}
            )
            error.add_note("The attribute `stages` is what was learned: build_prior(..., known=stages) goes on.")
            raise
        words.append(
            f"{stage.name.capitalize()}: {' x '.join(map(str, stage.shape))} "
            f"{'free coefficients' if number else 'coefficients under a softmax'} in {source.describe(result)}."
            + ("" if _order(learned) < _order(before) else f" The value is not below that of `{before.name}`.")
            + (f" Learning ended early: {note}." if note else "")
        )
        before = learned
    if groups == "layers" and evaluate is None and found is None:
        words.append("Nothing was learned by group, because merge_fn takes no `groups`.")
    chosen = min(candidates, key=_order)
    if any(chosen is each for each in candidates[: k + 1]):
        # The experts and their uniform average were judged as they were given.
        experts, permutations = originals, None
    report = reporting.write(
        candidates, chosen, k, similarity, alignment=alignment, learning=words, validation=source.validation
    )
    return Prior(
        params=model(experts, chosen.alpha, chosen.refreshed),
        alpha=chosen.alpha,
        groups=found.names if found is not None and chosen.alpha.ndim > 1 else None,
        chosen=chosen.name,
        candidates=tuple(candidates),
        similarity=similarity,
        permutations=permutations,
        stages=results,
        report=report,
    )


def _check_alone(evaluate: Any, given: dict[str, Any]) -> None:
    """Refuses what is not used beside `evaluate`."""
    check_callable(evaluate=evaluate)
    if beside := [name for name, argument in given.items() if argument is not None]:
        raise ValueError(f"evaluate was given together with {', '.join(beside)}; expected evaluate without them")


def _check_known(known: Any, stages: list[Stage], source: FromData | FromCalls) -> None:
    """Refuses results that belong to no stage of this call."""
    if not isinstance(known, Mapping):
        raise TypeError(f"known is a {type(known).__name__}; expected a mapping from a stage's name to its LearnResult")
    by_name = {stage.name: stage for stage in stages}
    for name, result in known.items():
        if name not in by_name:
            raise ValueError(f"known holds the stage {name!r}; expected stages of this call, {list(by_name)}")
        if not isinstance(result, LearnResult):
            raise TypeError(f"known[{name!r}] is a {type(result).__name__}; expected a LearnResult")
        stage = by_name[name]
        expected, found = (
            [jnp.shape(leaf) for leaf in jax.tree.leaves(state)]
            for state in (stage.first_state(None, source.optimizer(stage)), result.state)
        )
        if expected != found:
            raise ValueError(
                f"known[{name!r}] belongs to another call: its state has the shapes {found}; expected {expected}"
            )


def _not_aligned(spec: PermutationSpec | None, are_related: bool) -> str:
    """Says why the experts are not aligned."""
    if are_related:
        return "" if spec is None else "Related experts need no alignment, so none was tried."
    return (
        "No spec was given, so the experts were not aligned. If they come from separate initialisations, pass a "
        "PermutationSpec as spec (glue_jax.merging.chain_spec writes one)."
    )


def _check_fn(source: FromData | FromCalls, merge_fn: MergeFn) -> Callable[[Params], PyTree] | None:
    """Returns a function from an expert to its outputs, which finds a wrong spec. None if there are no outputs."""
    if merge_fn is not blend or not isinstance(source, FromData) or not isinstance(source.loss_fn, OutputLoss):
        return None
    outputs_fn, batch = source.loss_fn.outputs_fn, jax.tree.map(lambda leaf: leaf[: source.batch_size], source.data)
    return jax.jit(lambda params: outputs_fn(params, batch))


def _order(candidate: Candidate) -> float:
    """Returns the value by which candidates are compared: one that is not finite comes last."""
    return candidate.value if math.isfinite(candidate.value) else math.inf


def _tell(on_progress: Callable[[str, Progress], object] | None, stage: str, progress: Progress) -> None:
    """Calls `on_progress`. What it returns means nothing."""
    if on_progress is not None:
        on_progress(stage, progress)
