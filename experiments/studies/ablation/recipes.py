"""Ways from K experts to one model: the paper's, each remedy alone, and combinations."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.coefficients import make_steps
from experiments.protocol.config import Config
from experiments.protocol.training import cross_entropy
from experiments.studies.ablation.prerequisites import Alignment, Batches, Measured
from glue_jax.links import Link
from glue_jax.types import LinkFn, StepFn

Statistics = Literal["blended", "refreshed", "minibatch"]
Part = Literal["the paper", "remedies", "combinations"]
Grouping = Literal["model", "block", "layer", "layer, norms together"]

BLOCKS: Mapping[str, str] = {
    "convnet": r"(?:conv|norm)(\d)",
    "resnet20": r"blocks/\d+|head",
    "mobilenetv2": r"blocks/\d+|head",
    "vit": r"blocks/\d+|head",
}
"""By network, the pattern for `glue_jax.merging.group_by_path` that gives each block a group."""

Start = Callable[[Measured], jax.Array]
"""From what is known of the experts to coefficients on the simplex, `[K]`, or to several starts, `[S, K]`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A way from experts to one model, made of independent parts.

    Attributes:
        name: the name in the table.
        part: the part of the table in which the recipe stands.
        paper_config: the number of the paper's Config, if the recipe is one. The experiment may have measured it
            already.
        start: the coefficients at which learning starts. Without learning, these are the coefficients.
        first: another recipe, which learns one vector of coefficients for the model first. Each group starts there.
        step_fn: the step that learns the coefficients. None keeps the start.
        link_fn: the link from what is learned to the coefficients.
        task_vectors: whether the experts' common initialisation is blended too, as the origin of their differences.
        grouping: the parts of the network that have their own coefficients. With `norms together`, all norms share one
            vector.
        temperature: whether a temperature is learned too.
        learning_rate: Adam's learning rate for beta. By a cosine, it falls to a fiftieth at the last step. None is the
            experiment's own, which is constant. Gauss-Newton has none.
        most_steps: the largest number of steps, if the experiment allows as many. None is all that the experiment
            allows.
        objective: a function from logits and labels to the value that is minimised.
        statistics: the statistics of BatchNorm. `blended`: they are blended like everything else. `refreshed`: they are
            estimated on target images when the coefficients are known. `minibatch`: learning uses those of each
            minibatch, and they are refreshed afterwards.
        aligned: whether the experts' units are permuted first, jointly or to the first expert.
        merge: a function that makes the model without coefficients. It gets what is known of the experts, and
            minibatches of target images.
    """

    name: str
    _: dataclasses.KW_ONLY
    part: Part
    paper_config: int | None = None
    start: Start = lambda measured: glue_jax.coefficients.uniform(measured.num_experts)
    first: "Recipe | None" = None
    step_fn: StepFn | None = None
    link_fn: LinkFn = jax.nn.softmax
    task_vectors: bool = False
    grouping: Grouping = "model"
    temperature: bool = False
    learning_rate: float | None = None
    most_steps: int | None = None
    objective: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy
    statistics: Statistics = "blended"
    aligned: Alignment = "no"
    merge: Callable[[Measured, Batches], Variables] | None = None

    @property
    def outside_the_hull(self) -> bool:
        """Whether the coefficients may leave the convex hull of the experts. If not, they are a softmax."""
        return self.task_vectors or self.link_fn is not jax.nn.softmax

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides the result of the recipe, as JSON holds it. A function is there by its name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        step = self.step_fn
        if isinstance(step, functools.partial):
            fields |= {"step_fn": step.func, "step_words": step.keywords}
        named = {name: _named(value) for name, value in fields.items()}
        return {**named, "first": self.first and self.first.fingerprint}

    def groups(self, experts: Variables, network: str) -> glue_jax.merging.Groups | None:
        """Returns the groups of a network's leaves. None is one group for the model."""
        if self.grouping == "model":
            return None
        if self.grouping == "block":
            return glue_jax.merging.group_by_path(experts, BLOCKS[network])
        return glue_jax.merging.by_layer(experts, norms=None if self.grouping == "layer" else "norm")

    def __post_init__(self) -> None:
        """Refuses parts that do not go together.

        Raises:
            ValueError: if coefficients may leave the hull of the experts while BatchNorm's statistics are blended, or
                if the coefficients of the first recipe are no start for this one.
        """
        if self.first is not None:
            parts = ("link_fn", "task_vectors", "temperature", "aligned")
            if self.first.grouping != "model" or any(
                getattr(self.first, name) != getattr(self, name) for name in parts
            ):
                raise ValueError(
                    f"{self.name}: first is {self.first.name!r}; expected a recipe of the grouping 'model', with the "
                    f"same {', '.join(parts)}"
                )
        if self.outside_the_hull and self.statistics != "minibatch":
            raise ValueError(
                f"{self.name}: statistics is {self.statistics!r}; expected 'minibatch' with coefficients outside the "
                "experts' convex hull, where a blended variance can be negative"
            )


def _named(value: Any) -> Any:
    """Returns a value as JSON holds it. A function is there by its name, and a link by its parts."""
    if isinstance(value, Link):
        return {field.name: _named(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return getattr(value, "__name__", value)


def _fisher_weighted(measured: Measured, _: Batches) -> Variables:
    """Returns the average of the experts, weighted by their Fisher information on the validation images."""
    return glue_jax.merging.fisher_merge(
        measured.experts("no"), measured.fishers(), glue_jax.coefficients.uniform(measured.num_experts)
    )


def _regmean(measured: Measured, batches: Batches) -> Variables:
    """Returns the experts merged layer by layer, by the inputs that target images give to each layer."""
    return glue_jax.merging.regmean_merge(measured.experts("no"), measured.grams(batches))


def _several_starts(measured: Measured) -> jax.Array:
    """Returns three starts: the uniform average, the best expert, and a softmax of negative losses."""
    losses = measured.losses()
    return jnp.stack(
        [
            glue_jax.coefficients.uniform(measured.num_experts),
            glue_jax.merging.best_expert(losses),
            glue_jax.merging.loss_weights(losses),
        ]
    )


def _best(measured: Measured) -> jax.Array:
    """The best expert alone."""
    return glue_jax.merging.best_expert(measured.losses())


def _greedy(measured: Measured) -> jax.Array:
    """A greedy soup."""
    return glue_jax.merging.greedy_soup(measured.experts("no"), measured.losses(), measured.validation_loss)


def _by_loss(measured: Measured) -> jax.Array:
    """A softmax of negative losses."""
    return glue_jax.merging.loss_weights(measured.losses())


def _by_accuracy(measured: Measured) -> jax.Array:
    """Proportional to the accuracies."""
    return glue_jax.coefficients.proxy_accuracy_weights(measured.accuracies())


def _entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean entropy of the predictions, which needs no labels."""
    del labels
    return glue_jax.objectives.entropy(logits)


def recipes(config: Config) -> list[Recipe]:
    """Returns all recipes. They use the config's step of GLUE, unless they have other directions."""
    radius, num_experts = config.radius, config.num_experts
    spsa = make_steps(config)[4]
    many = functools.partial(
        glue_jax.spsa_step, radius=radius, directions="simplex_orthogonal", num_directions=num_experts - 1
    )
    # A step function: see glue_jax.objectives.
    wide = functools.partial(many, radius=0.3)
    free = functools.partial(glue_jax.spsa_step, radius=radius, directions="orthogonal", num_directions=num_experts)
    # By layer there are many more dimensions to probe.
    free_by_layer = functools.partial(free, num_directions=2 * num_experts)
    full, gauss_newton = glue_jax.full_gradient_step, glue_jax.gauss_newton_step

    paper = functools.partial(Recipe, part="the paper")
    remedy = functools.partial(Recipe, part="remedies")
    combination = functools.partial(Recipe, part="combinations")

    def from_coarse_to_fine(name: str, of_model: StepFn, of_layers: StepFn, aligned: Alignment = "no") -> list[Recipe]:
        has_rate = of_model is not glue_jax.gauss_newton_step
        coarse = combination(
            name,
            step_fn=of_model,
            link_fn=glue_jax.unconstrained,
            learning_rate=2e-2 if has_rate else None,
            most_steps=200,
            statistics="minibatch",
            aligned=aligned,
        )
        fine = dataclasses.replace(
            coarse,
            name=f"{name}, by layer",
            first=coarse,
            step_fn=of_layers,
            grouping="layer, norms together",
            learning_rate=5e-3 if has_rate else None,
            most_steps=500,
        )
        return [coarse, fine]

    free_model, free_layers = from_coarse_to_fine("free coefficients", free, free_by_layer)
    return [
        paper("1 data size (uniform)", paper_config=1),
        paper("2 proxy accuracy", paper_config=2, start=_by_accuracy),
        paper("3 full gradient", paper_config=3, step_fn=full),
        paper("4 GLUE", paper_config=4, step_fn=spsa),
        remedy("best expert", start=_best),
        remedy("softmax(-loss)", start=_by_loss),
        remedy("greedy soup", start=_greedy),
        remedy("Fisher-weighted", merge=_fisher_weighted),
        remedy("RegMean", merge=_regmean),
        remedy("RegMean, refreshed", merge=_regmean, statistics="refreshed"),
        remedy("uniform, refreshed", statistics="refreshed"),
        remedy("uniform, aligned to the first", aligned="to the first"),
        remedy("uniform, aligned", aligned="jointly"),
        remedy("5 Gauss-Newton", step_fn=gauss_newton),
        remedy("Gauss-Newton, minibatch", step_fn=gauss_newton, statistics="minibatch"),
        remedy("GLUE, refreshed", step_fn=spsa, statistics="refreshed"),
        remedy("GLUE, minibatch", step_fn=spsa, statistics="minibatch"),
        remedy("GLUE, K - 1 directions", step_fn=many),
        remedy("GLUE from three starts", step_fn=spsa, start=_several_starts),
        remedy("GLUE, by block", step_fn=many, grouping="block"),
        remedy("GLUE, by layer", step_fn=many, grouping="layer"),
        remedy("GLUE, temperature", step_fn=spsa, temperature=True),
        remedy("GLUE on accuracy", step_fn=wide, objective=glue_jax.objectives.error_rate),
        remedy("GLUE on entropy", step_fn=spsa, objective=_entropy),
        combination("uniform, aligned to the first, refreshed", aligned="to the first", statistics="refreshed"),
        combination("uniform, aligned, refreshed", aligned="jointly", statistics="refreshed"),
        combination("minibatch, by block", step_fn=many, statistics="minibatch", grouping="block"),
        combination(
            "minibatch, temperature, by block", step_fn=many, statistics="minibatch", grouping="block", temperature=True
        ),
        combination(
            "minibatch, temperature, by layer", step_fn=many, statistics="minibatch", grouping="layer", temperature=True
        ),
        free_model,
        free_layers,
        dataclasses.replace(free_model, name="free coefficients, temperature", temperature=True),
        dataclasses.replace(free_model, name="task vectors", task_vectors=True),
        *from_coarse_to_fine("full gradient, free coefficients", full, full),
        *from_coarse_to_fine("Gauss-Newton, free coefficients", gauss_newton, gauss_newton),
        *from_coarse_to_fine("aligned, free coefficients", free, free_by_layer, "jointly"),
        *from_coarse_to_fine("Gauss-Newton, aligned, free coefficients", gauss_newton, gauss_newton, "jointly"),
    ]
