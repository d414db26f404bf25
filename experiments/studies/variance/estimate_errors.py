"""The measurements of `experiments.studies.variance`, part by part. The result of each part is kept on disk."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import glue_jax
from experiments.protocol.coefficients import learn_coefficients
from experiments.protocol.config import CoefficientFields, Config, part
from experiments.protocol.context import Context, take
from experiments.protocol.data import Examples
from experiments.protocol.expert_training import train_experts
from experiments.runtime.progress import Stage
from experiments.runtime.stages import Stages
from experiments.studies.variance import statistics
from experiments.studies.variance.radius import RADII, derivative_errors, radius_findings
from experiments.studies.variance.settings import TOLERANCE, Settings
from experiments.studies.variance.statistics import Estimator, Objective
from glue_jax import theory
from glue_jax.batches import on_cpu
from glue_jax.types import LinkFn, LossFn, Params

ESTIMATORS = (
    Estimator("alpha", "sphere", "paper"),
    Estimator("beta", "rademacher", "unbiased"),
    Estimator("beta", "sphere", "unbiased"),
    Estimator("beta", "orthogonal", "unbiased"),
    Estimator("beta", "simplex_orthogonal", "unbiased"),
)

_LINKS: Mapping[str, LinkFn] = {"alpha": glue_jax.unconstrained, "beta": jax.nn.softmax}
_POINTS = ("uniform", "learned", "corner")
# The coefficient of the best expert at the corner.
_CORNER_WEIGHT = 0.9
# An accelerator computes so many probes at once, because all probes of a chunk might not fit into its memory.
_IMAGES_AT_ONCE = 2048


def measure(context: Context, settings: Settings, stages: Stages) -> dict[str, Any]:
    """Trains or reads the experts, and measures what is not measured yet.

    Returns:
        A dict that JSON holds: `config`, `settings`, `data` (its name, the number of target images), `machine`,
        `seconds` by kind of part, `learning_steps`, and

        - `points`, a row for each point in the experts' hull: its `point` (uniform, learned or corner), `K`, `alpha`
          and `loss` in nats, the norms of the gradients for alpha (and of its zero-sum part), for beta and for the
          parameters, and the spectral and the Frobenius norm of the experts;
        - `errors`, a row for each point, estimator and m: see `experiments.studies.variance.statistics.error_rows`; in
          alpha also with `equation_19` and `bound`, Eq. (13), over ||g||²;
        - `radii`, a row for each point of all experts: `radii`, the directional derivatives' `errors`, and
          `error_at_radius` at the run's; `rms_derivative` and `loss_rounding` in nats; and what
          `experiments.studies.variance.radius.radius_findings` returns.

    Raises:
        FloatingPointError: if a loss is not finite, or if a gradient is zero; the error has the name of the part.
    """
    config = context.config
    experts, training = train_experts(context)
    target = context.target(config.seeds[0])
    generator = np.random.default_rng(settings.measuring_seed)
    rows = np.sort(generator.choice(len(target.labels), settings.examples, replace=False))
    setting = _Setting(
        context=context,
        settings=settings,
        stages=stages,
        experts=glue_jax.stack_experts(experts),
        target=target,
        batch=take(target, rows),
        losses={space: functools.partial(_blended_loss, context.problem.loss, link) for space, link in _LINKS.items()},
    )
    num_probes, num_radii = number_of_directions(config, settings)
    with jax.default_matmul_precision(config.matmul_precision):
        learned, corner = _learned(setting), _corner(setting)
        uniform = [glue_jax.coefficients.uniform(k) for k in (config.num_experts, *_subsets(config, settings))]
        alphas = [("uniform", np.asarray(alpha).tolist()) for alpha in uniform]
        alphas += [("learned", learned["alpha"]), ("corner", corner["alpha"])]
        points = [_geometry(setting, name, alpha) for name, alpha in alphas]
        bar = context.progress.stage("Errors", num_probes)
        errors = [_errors(setting, point, estimator, bar) for point in points for estimator in ESTIMATORS]
        bar = context.progress.stage("Radii", num_radii)
        radii = [_radii_at(setting, point, bar) for point in points if point["K"] == config.num_experts]
    records = {"experts": training, "points": [learned, corner, *points], "errors": errors, "radii": radii}
    return {
        "config": dataclasses.asdict(config),
        "settings": dataclasses.asdict(settings),
        "data": {"name": context.dataset.name, "target": len(target.labels)},
        "points": points,
        "learning_steps": learned["steps"],
        "errors": [row for record in errors for row in record["rows"]],
        "radii": radii,
        "seconds": {name: sum(record["seconds"] for record in group) for name, group in records.items()},
        "machine": "; ".join(sorted({record["machine"] for group in records.values() for record in group})),
    }


def number_of_directions(config: Config, settings: Settings) -> tuple[int, int]:
    """Returns the number of directions that are probed for the errors, and for the radii."""
    points = len(_POINTS) + len(_subsets(config, settings))
    return points * len(ESTIMATORS) * settings.probes, len(_POINTS) * len(_radii(config)) * settings.radius_directions


def _subsets(config: Config, settings: Settings) -> list[int]:
    """The numbers of experts that are smaller than K."""
    return [k for k in sorted(set(settings.subsets)) if k < config.num_experts]


def _radii(config: Config) -> list[float]:
    """The radii that are tried, including the run's."""
    return sorted({*RADII, config.radius})


class _Setting(NamedTuple):
    """What the parts share."""

    context: Context
    settings: Settings
    stages: Stages
    experts: Params
    target: Examples
    batch: Examples
    losses: Mapping[str, Callable[..., jax.Array]]

    def first(self, k: int) -> Params:
        """The first K experts."""
        return jax.tree.map(lambda leaf: leaf[:k], self.experts)

    @property
    def probe_batch_size(self) -> int | None:
        """How many probes an accelerator evaluates at once. It is None on a CPU, whose default is one."""
        return None if on_cpu(self.batch) else max(1, _IMAGES_AT_ONCE // self.settings.examples)

    def objective(self, space: str, k: int) -> Objective:
        """The loss of a blend of the first K experts."""
        return Partial(self.losses[space], self.first(k), self.batch)

    def part(
        self,
        name: str,
        depends_on: Mapping[str, Any],
        compute: Callable[[jax.Array], dict[str, Any]],
        bar: Stage | None = None,
        units: int = 0,
    ) -> dict[str, Any]:
        """Returns one part. It is computed with its own key. If it is kept already, its units are taken off the bar."""
        config = self.context.config
        depends_on = {
            **self.context.bank_fields,
            **depends_on,
            "target": [config.seeds[0], config.target_examples],
            "matmul_precision": config.matmul_precision,
            "examples": self.settings.examples,
            "measuring_seed": self.settings.measuring_seed,
            "code": self.context.code(measure),
        }
        key = jax.random.fold_in(jax.random.key(self.settings.measuring_seed), zlib.crc32(name.encode()))
        return self.stages.run(name, depends_on, lambda: compute(key), bar, units)


def _learned(setting: _Setting) -> dict[str, Any]:
    """The last coefficients of a run of GLUE, with the experiment's numbers."""
    context, max_steps = setting.context, setting.context.config.alpha_steps
    bar = context.progress.stage("Learning", max_steps)

    def compute(key: jax.Array) -> dict[str, Any]:
        result = learn_coefficients(context, 4, key, setting.experts, setting.target, context.validation, bar=bar)
        return {"alpha": np.asarray(result.last_alpha).tolist(), "steps": len(result.history.metrics.loss)}

    return setting.part("points/learned", part(context.config, CoefficientFields), compute, bar, max_steps)


def _corner(setting: _Setting) -> dict[str, Any]:
    """The coefficients near the expert with the lowest loss."""
    k = setting.context.config.num_experts

    def compute(key: jax.Array) -> dict[str, Any]:
        del key
        loss = setting.objective("alpha", k)
        best = int(np.argmin([statistics.value_and_gradient(loss, one_hot)[0] for one_hot in jnp.eye(k)]))
        alpha = np.full(k, (1 - _CORNER_WEIGHT) / (k - 1))
        alpha[best] = _CORNER_WEIGHT
        return {"alpha": alpha.tolist()}

    return setting.part("points/corner", {"weight": _CORNER_WEIGHT}, compute)


def _geometry(setting: _Setting, name: str, alpha: list[float]) -> dict[str, Any]:
    """The loss at a point, its gradients, and the two norms of Eq. (20)."""
    k = len(alpha)

    def compute(key: jax.Array) -> dict[str, Any]:
        del key
        loss, in_alpha = statistics.value_and_gradient(setting.objective("alpha", k), _coordinates("alpha", alpha))
        _, in_beta = statistics.value_and_gradient(setting.objective("beta", k), _coordinates("beta", alpha))
        blend = glue_jax.blend(setting.first(k), _coordinates("alpha", alpha))
        spectral_norm, frobenius_norm = statistics.expert_norms(setting.first(k))
        return {
            "point": name,
            "K": k,
            "alpha": alpha,
            "loss": loss,
            "alpha_gradient_norm": float(np.linalg.norm(in_alpha)),
            "zero_sum_gradient_norm": float(np.linalg.norm(in_alpha - in_alpha.mean())),
            "beta_gradient_norm": float(np.linalg.norm(in_beta)),
            "parameter_gradient_norm": float(_gradient_norm(setting.context.problem.loss, blend, setting.batch)),
            "experts_spectral_norm": spectral_norm,
            "experts_frobenius_norm": frobenius_norm,
        }

    return setting.part(f"points/{name}-K{k}", {"alpha": alpha}, compute)


def _errors(setting: _Setting, point: Mapping[str, Any], estimator: Estimator, bar: Stage) -> dict[str, Any]:
    """Returns the errors of one estimator at one point, with a row for each m."""
    k, settings, radius = point["K"], setting.settings, setting.context.config.radius
    # These numbers give whole blocks for both kinds of orthogonal directions.
    averaged = sorted({*settings.averaged, k - 1, k})
    at = _coordinates(estimator.space, point["alpha"])

    def compute(key: jax.Array) -> dict[str, Any]:
        fun = setting.objective(estimator.space, k)
        _, gradient = statistics.value_and_gradient(fun, at)
        directions = glue_jax.directions.sample_directions(key, at, settings.probes, estimator.directions)
        derivatives = statistics.probe(
            fun, at, directions, radius, probe_batch_size=setting.probe_batch_size, advance=bar.advance
        )
        rows = statistics.error_rows(directions, derivatives, gradient, estimator, averaged)
        if estimator.space == "alpha":
            norms = point["experts_spectral_norm"], point["parameter_gradient_norm"]
            square = float(np.sum(gradient**2))
            for row in rows:
                row["equation_19"] = theory.paper_mean_squared_error(gradient, row["m"]) / square
                row["bound"] = theory.proposition_1_bound(k, row["m"], *norms) / square
        return {"rows": rows}

    depends_on = {
        "alpha": point["alpha"],
        "estimator": estimator,
        "radius": radius,
        "probes": settings.probes,
        "averaged": averaged,
    }
    name = f"errors/{point['point']}-K{k}-{estimator.space}-{estimator.directions}"
    record = setting.part(name, depends_on, compute, bar, settings.probes)
    names = {"point": point["point"], "K": k, **estimator._asdict()}
    return {**record, "rows": [{**names, **row} for row in record["rows"]]}


def _radii_at(setting: _Setting, point: Mapping[str, Any], bar: Stage) -> dict[str, Any]:
    """Returns the error of the directional derivatives in beta by the radius, and how it grows on either side."""
    config, count, radii = setting.context.config, setting.settings.radius_directions, _radii(setting.context.config)
    at = _coordinates("beta", point["alpha"])

    def compute(key: jax.Array) -> dict[str, Any]:
        fun = setting.objective("beta", point["K"])
        directions = glue_jax.directions.sample_directions(key, at, count, "sphere")
        errors, size = derivative_errors(
            fun, at, directions, radii, probe_batch_size=setting.probe_batch_size, advance=bar.advance
        )
        # Independent rounding errors r of two losses put r/(√2 radius) into a derivative.
        rounding = float(np.sqrt(2) * size * errors[0] * radii[0])
        return {"errors": errors, "rms_derivative": size, "loss_rounding": rounding}

    depends_on = {"alpha": point["alpha"], "radii": radii, "radius_directions": count}
    record = setting.part(f"radii/{point['point']}", depends_on, compute, bar, len(radii) * count)
    errors = record["errors"]
    return {
        "point": point["point"],
        "radii": radii,
        **record,
        "error_at_radius": errors[radii.index(config.radius)],
        **radius_findings(radii, errors, TOLERANCE),
    }


def _coordinates(space: str, alpha: list[float]) -> jax.Array:
    """Coefficients in the space that is probed."""
    return glue_jax.coefficients.weights_to_logits(alpha) if space == "beta" else jnp.asarray(alpha, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _gradient_norm(loss_fn: LossFn, params: Params, batch: Examples) -> jax.Array:
    """The norm of the loss's gradient for the parameters."""
    return optax.tree.norm(jax.grad(loss_fn)(params, batch))


def _blended_loss(loss_fn: LossFn, link_fn: LinkFn, experts: Params, batch: Examples, beta: jax.Array) -> jax.Array:
    """Returns L as a function of the coefficients."""
    return loss_fn(glue_jax.blend(experts, link_fn(beta)), batch)
