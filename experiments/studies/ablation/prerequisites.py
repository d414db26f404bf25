"""What recipes may know of the experts, and how many passes that takes."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import jax

import glue_jax
from experiments.models.inputs import input_grams
from experiments.models.network import Variables
from experiments.protocol.data import Examples
from experiments.protocol.training import Problem

Alignment = Literal["no", "to the first", "jointly"]
Batches: TypeAlias = Sequence[jax.Array]
"""Minibatches of target images."""


class Measured:
    """The experts, and what validation images tell about them.

    Attributes:
        problem: the network with the preparation of its images.
        experts: the stacked experts, each leaf `[K, ...]`, by how their units are permuted. Each is computed once.
        num_experts: K, the number of experts.
        validation: the validation images.
        passes: how many times one model went forward on one image to compute what was asked for. Callers reset it to 0.
    """

    def __init__(
        self,
        problem: Problem,
        experts: Callable[[Alignment], Variables],
        table: Sequence[Mapping[str, float]],
        validation: Examples,
        evaluate: Callable[[Variables, Examples], Mapping[str, float]],
    ):
        """Keeps `table`, with a row of `measured_experts` for each expert, and `evaluate` of the context."""
        self.problem, self.experts, self.validation = problem, experts, validation
        self.num_experts, self.passes = len(table), 0
        self._table, self._evaluate = table, evaluate

    def losses(self) -> list[float]:
        """Returns the loss of each expert on the validation images, `[K]`."""
        return self._column("validation_loss")

    def accuracies(self) -> list[float]:
        """Returns the accuracy of each expert on the validation images, fractions `[K]`."""
        return self._column("validation_accuracy")

    def validation_loss(self, variables: Variables) -> float:
        """Returns the loss of any model on the validation images."""
        self.passes += len(self.validation.labels)
        return self._evaluate(variables, self.validation)["loss"]

    def fishers(self) -> Variables:
        """Returns the diagonal Fisher information of each expert on the validation images, stacked."""
        self.passes += self.num_experts * len(self.validation.labels)
        fisher = _fisher(self.problem)
        return glue_jax.stack_experts([fisher(expert, self.validation.images) for expert in self._each()])

    def grams(self, batches: Batches) -> dict[str, jax.Array]:
        """Returns the Gram matrix of each expert's inputs to each layer, by the layer's kernel, `[K, in, in]`."""
        self.passes += self.num_experts * sum(map(len, batches))
        grams = _grams(self.problem)
        each = [[grams(expert, batch) for batch in batches] for expert in self._each()]
        return glue_jax.stack_experts([jax.tree.map(lambda *parts: sum(parts), *of_one) for of_one in each])

    def _each(self) -> Iterator[Variables]:
        """Yields the experts, one after another."""
        experts = self.experts("no")
        for i in range(self.num_experts):
            yield jax.tree.map(lambda leaf, i=i: leaf[i], experts)

    def _column(self, name: str) -> list[float]:
        self.passes += self.num_experts * len(self.validation.labels)
        return [row[name] for row in self._table]


@functools.cache
def _fisher(problem: Problem) -> Callable[[Variables, jax.Array], Variables]:
    """The Fisher information of one expert, compiled once for a problem."""
    return jax.jit(functools.partial(glue_jax.merging.diagonal_fisher, problem.logits))


@functools.cache
def _grams(problem: Problem) -> Callable[[Variables, jax.Array], dict[str, jax.Array]]:
    """The Gram matrices of one expert on a minibatch, compiled once for a problem."""
    return jax.jit(functools.partial(input_grams, problem.logits))
