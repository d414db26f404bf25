"""What `build_prior` finds out about the experts' weights, and the report that says what it did and why."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.merging.similarity import weight_similarity
from glue_jax.types import Params

RELATED = 0.1
"""Two experts are related if the cosine of their kernels is at least this.

On the digits, the cosines of ten experts of one initialisation are between 0.82 and 0.90. Those of ten experts of
separate initialisations are between -0.04 and 0.05. The cosine of two random kernels of n numbers has the standard
deviation 1 / sqrt(n).
"""


class Candidate(NamedTuple):
    """A model among which `build_prior` chooses.

    Attributes:
        name: `expert i`, `uniform average`, `aligned average`, `learned` or `learned by group`.
        alpha: its coefficients, float32 `[K]`, or `[G, K]` by group.
        value: its validation value. NaN if `evaluate` could not evaluate it.
        passes: how often one model went forward on one example to learn, refresh and validate it. The passes of
            `statistics_fn` for a minibatch are not counted. With `evaluate`: how often it was called.
        refreshed: whether its BatchNorm statistics were refreshed.
        note: why its learning ended early. None if it did not.
    """

    name: str
    alpha: jax.Array
    value: float
    passes: int
    refreshed: bool
    note: str | None = None


class Relation(NamedTuple):
    """How an expert's weights are related to those of the other experts.

    Attributes:
        cosine: the median of K - 1 cosines. Each is between the expert's kernels and those of another expert, all
            kernels taken as one vector. Kernels are leaves with at least two axes inside an expert. Without kernels,
            all floating-point leaves count.
        related: whether the cosine is at least 0.1.
    """

    cosine: float
    related: bool


def relations(experts: Params) -> tuple[Relation, ...]:
    """Returns how each of K experts is related to the others."""
    kernels, floating = (
        jax.tree.map(
            lambda leaf, axes=axes: (
                leaf if np.ndim(leaf) >= axes and jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else None
            ),
            experts,
        )
        for axes in (3, 1)
    )
    return relations_of(weight_similarity(kernels if jax.tree.leaves(kernels) else floating).cosine[0])


def relations_of(cosine: np.ndarray) -> tuple[Relation, ...]:
    """Returns how each of K experts is related to the others, from the cosines between them, `[K, K]`."""
    k = len(cosine)
    others = np.median(cosine[~np.eye(k, dtype=bool)].reshape(k, k - 1), axis=1)
    return tuple(Relation(float(each), bool(each >= RELATED)) for each in others)


def write(
    candidates: Sequence[Candidate],
    chosen: Candidate,
    k: int,
    similarity: Sequence[Relation] | None,
    *,
    alignment: str,
    learning: Sequence[str],
    validation: str,
) -> str:
    """Returns the report, Markdown.

    Args:
        candidates: all candidates; those of the K experts come first.
        chosen: one of them.
        k: the number of experts.
        similarity: how each expert is related to the others. None if this says nothing.
        alignment: what was done about units in another order, a sentence.
        learning: what was learned, sentences.
        validation: what gave the values, a sentence.
    """
    cosines = [f"{each.cosine:.2f}" for each in similarity or ()]
    cosines += [""] * (len(candidates) - len(cosines))
    rows = [
        f"| {f'**{each.name}**' if each is chosen else each.name} | {each.value:.4g} | {cosine} | {each.passes:,} |"
        for each, cosine in zip(candidates, cosines, strict=True)
    ]
    table = ["| model | value | cosine to the others | passes |", "| --- | ---: | ---: | ---: |", *rows]
    relation = are_related(similarity) if similarity else ""
    sentences = [relation, alignment, *learning, validation, _why(candidates, chosen, k)]
    return "\n".join([*table, "", *(f"- {sentence}" for sentence in sentences if sentence)]) + "\n"


def outliers(similarity: Sequence[Relation]) -> list[int]:
    """Returns the experts that are not related to the others, if the most experts are."""
    apart = [index for index, each in enumerate(similarity) if not each.related]
    return apart if 2 * len(apart) < len(similarity) else []


def are_related(similarity: Sequence[Relation]) -> str:
    """Says whether the experts are related, and which expert is an outlier."""
    cosines = [each.cosine for each in similarity]
    if math.isnan(sum(cosines)):
        return "An expert's weights are all 0, so the cosines do not tell whether the experts are related."
    if apart := outliers(similarity):
        several = len(apart) > 1
        return (
            f"Expert{'s' * several} {', '.join(map(str, apart))} {'are outliers' if several else 'is an outlier'}: the "
            f"cosine to the others is below {RELATED}. The other experts are related."
        )
    if all(each.related for each in similarity):
        return (
            f"The experts are related: the median cosine of an expert's weights to the others' is at least "
            f"{min(cosines):.2f}, and {RELATED} is enough."
        )
    return (
        f"The experts are unrelated: the median cosine of an expert's weights to the others' is as low as "
        f"{min(cosines):.2f}, below {RELATED}. Their average mixes units that have nothing in common."
    )


def _why(candidates: Sequence[Candidate], chosen: Candidate, k: int) -> str:
    """Says which candidate was chosen and why, and which could not win."""
    best = min(
        (each for each in candidates[:k] if math.isfinite(each.value)), key=lambda each: each.value, default=None
    )
    words = f"Chosen: {chosen.name}, because its value is the lowest, {chosen.value:.4g}."
    if best is not None and best is not chosen:
        words += f" The best expert is {best.name.split()[1]}, with {best.value:.4g}."
    if bad := [each.name for each in candidates if not math.isfinite(each.value)]:
        words += f" Not in the choice, because the value is not finite: {', '.join(bad)}."
    return words
