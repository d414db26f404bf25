"""GLUE: blend pretrained experts into one model, with coefficients learned from forward passes alone.

The method is of Park, Chaudhari, Pranav, Joe-Wong and Moura, "GLUE: Gradient-free Learning to Unify Experts"
(https://arxiv.org/abs/2512.22467). Equation numbers in this package are that paper's first version's.
"""

from glue_jax import theory
from glue_jax.alignment import Alignment, Permutations, align, align_experts, permute
from glue_jax.ask_tell import OutputProbes, Probes, ask, ask_outputs, tell, tell_outputs
from glue_jax.batch_norm import refresh_statistics
from glue_jax.batches import batched_mean, minibatch_indices
from glue_jax.blending import blend
from glue_jax.calibration import Calibration, calibrate
from glue_jax.coefficients import (
    data_size_weights,
    proxy_accuracy_weights,
    uniform,
    weights_to_logits,
)
from glue_jax.directions import Directions, sample_directions
from glue_jax.estimators import Estimate, forward_gradient, full_gradient, spsa_gradient
from glue_jax.experts import num_experts, stack_experts
from glue_jax.gauss_newton import gauss_newton_step
from glue_jax.groups import Groups, by_layer, group_by_path
from glue_jax.learning import NonFiniteLossError, learn
from glue_jax.links import Link, Tempered, box, task_vector_weights, tempered_link, tempered_merge, unconstrained
from glue_jax.objectives import OutputLoss, entropy, error_rate
from glue_jax.paths import combine, leaf_paths, partition
from glue_jax.permutation_specs import PermutationSpec, chain_spec
from glue_jax.planning import plan
from glue_jax.plans import Plan
from glue_jax.regmean import regmean_merge
from glue_jax.similarity import Similarity, loss_barriers, weight_similarity
from glue_jax.soups import best_expert, diagonal_fisher, fisher_merge, greedy_soup, loss_weights
from glue_jax.starts import learn_from_starts
from glue_jax.steps import alpha, forward_gradient_step, full_gradient_step, init, spsa_step
from glue_jax.types import (
    Diagnostics,
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
    "Alignment",
    "Calibration",
    "Diagnostics",
    "Directions",
    "Estimate",
    "GlueMetrics",
    "GlueState",
    "Groups",
    "History",
    "LearnResult",
    "Link",
    "LinkFn",
    "LossFn",
    "MergeFn",
    "NonFiniteLossError",
    "OutputLoss",
    "OutputProbes",
    "PermutationSpec",
    "Permutations",
    "Plan",
    "Probes",
    "Progress",
    "Similarity",
    "StepFn",
    "Tempered",
    "align",
    "align_experts",
    "alpha",
    "ask",
    "ask_outputs",
    "batched_mean",
    "best_expert",
    "blend",
    "box",
    "by_layer",
    "calibrate",
    "chain_spec",
    "combine",
    "data_size_weights",
    "diagonal_fisher",
    "entropy",
    "error_rate",
    "fisher_merge",
    "forward_gradient",
    "forward_gradient_step",
    "full_gradient",
    "full_gradient_step",
    "gauss_newton_step",
    "greedy_soup",
    "group_by_path",
    "init",
    "leaf_paths",
    "learn",
    "learn_from_starts",
    "loss_barriers",
    "loss_weights",
    "minibatch_indices",
    "num_experts",
    "partition",
    "permute",
    "plan",
    "proxy_accuracy_weights",
    "refresh_statistics",
    "regmean_merge",
    "sample_directions",
    "spsa_gradient",
    "spsa_step",
    "stack_experts",
    "task_vector_weights",
    "tell",
    "tell_outputs",
    "tempered_link",
    "tempered_merge",
    "theory",
    "unconstrained",
    "uniform",
    "weight_similarity",
    "weights_to_logits",
]
