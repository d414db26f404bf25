"""GLUE: blend pretrained experts into one model, with coefficients learned from forward passes alone.

The method comes from Park, Chaudhari, Pranav, Joe-Wong and Moura, "GLUE: Gradient-free Learning to Unify Experts"
(https://arxiv.org/abs/2512.22467). This package cites the equations by their numbers in the first version of that
paper.

This page lists what a first reader needs. The modules hold the rest:

- `glue_jax.checkpoints`: read and write files of PyTorch, Hugging Face and orbax. It is imported by itself.
- `glue_jax.merging`: compare experts, align their permutations, repair BatchNorm, learn coefficients by layer, make
  soups.
- `glue_jax.links`: coefficients outside the convex hull, and a learned temperature.
- `glue_jax.coefficients`: coefficients that need no learning.
- `glue_jax.objectives`: losses in two parts, the error rate, and the entropy.
- `glue_jax.estimators` and `glue_jax.directions`: gradients of any function of few coefficients.
- `glue_jax.plans`: the parts of the report that `plan` returns.
- `glue_jax.batches`: minibatches of arrays.
- `glue_jax.paths`: parts of a pytree, named by paths.
- `glue_jax.theory`: the paper's formulas for cost and error.
- `glue_jax.types`: the types in the signatures.
"""

from glue_jax import (
    batches,
    coefficients,
    directions,
    estimators,
    links,
    merging,
    objectives,
    paths,
    plans,
    theory,
    types,
)
from glue_jax.ask_tell import OutputProbes, Probes, ask, ask_outputs, tell, tell_outputs
from glue_jax.blending import blend
from glue_jax.calibration import Calibration, calibrate
from glue_jax.experts import num_experts, stack_experts
from glue_jax.failures import NonFiniteLossError
from glue_jax.gauss_newton import gauss_newton_step
from glue_jax.learning import learn
from glue_jax.links import unconstrained
from glue_jax.objectives import OutputLoss
from glue_jax.paths import combine, partition
from glue_jax.planning import plan
from glue_jax.plans import Plan
from glue_jax.priors import Prior, build_prior
from glue_jax.starts import learn_from_starts
from glue_jax.states import alpha, init
from glue_jax.steps import forward_gradient_step, full_gradient_step, spsa_step
from glue_jax.types import GlueMetrics, GlueState, LearnResult

__version__ = "0.2.0.dev0"

__all__ = [
    "Calibration",
    "GlueMetrics",
    "GlueState",
    "LearnResult",
    "NonFiniteLossError",
    "OutputLoss",
    "OutputProbes",
    "Plan",
    "Prior",
    "Probes",
    "alpha",
    "ask",
    "ask_outputs",
    "batches",
    "blend",
    "build_prior",
    "calibrate",
    "coefficients",
    "combine",
    "directions",
    "estimators",
    "forward_gradient_step",
    "full_gradient_step",
    "gauss_newton_step",
    "init",
    "learn",
    "learn_from_starts",
    "links",
    "merging",
    "num_experts",
    "objectives",
    "partition",
    "paths",
    "plan",
    "plans",
    "spsa_step",
    "stack_experts",
    "tell",
    "tell_outputs",
    "theory",
    "types",
    "unconstrained",
]
