"""GLUE: blend pretrained experts into one model, with coefficients learned from forward passes alone.

The method is of Park, Chaudhari, Pranav, Joe-Wong and Moura, "GLUE: Gradient-free Learning to Unify Experts"
(https://arxiv.org/abs/2512.22467). Equation numbers in this package are that paper's first version's.
"""

from glue_jax import theory
from glue_jax.batches import batched_mean, minibatch_indices
from glue_jax.coefficients import (
    data_size_weights,
    proxy_accuracy_weights,
    unconstrained,
    uniform,
    weights_to_logits,
)
from glue_jax.directions import Directions, sample_directions
from glue_jax.estimators import Estimate, forward_gradient, full_gradient, spsa_gradient
from glue_jax.experts import blend, num_experts, stack_experts
from glue_jax.learning import NonFiniteLossError, learn
from glue_jax.steps import alpha, forward_gradient_step, full_gradient_step, init, spsa_step
from glue_jax.types import (
    GlueMetrics,
    GlueState,
    History,
    LearnResult,
    LinkFn,
    LossFn,
    MergeFn,
    Progress,
    StepFn,
)

__version__ = "0.1.0"

__all__ = [
    "Directions",
    "Estimate",
    "GlueMetrics",
    "GlueState",
    "History",
    "LearnResult",
    "LinkFn",
    "LossFn",
    "MergeFn",
    "NonFiniteLossError",
    "Progress",
    "StepFn",
    "alpha",
    "batched_mean",
    "blend",
    "data_size_weights",
    "forward_gradient",
    "forward_gradient_step",
    "full_gradient",
    "full_gradient_step",
    "init",
    "learn",
    "minibatch_indices",
    "num_experts",
    "proxy_accuracy_weights",
    "sample_directions",
    "spsa_gradient",
    "spsa_step",
    "stack_experts",
    "theory",
    "unconstrained",
    "uniform",
    "weights_to_logits",
]
