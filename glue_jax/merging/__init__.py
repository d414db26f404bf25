"""What prepares experts for a blend, repairs the blend, and rivals it.

- Are the experts alike? `weight_similarity`, `loss_barriers`.
- Units in another order: `chain_spec`, `align`, `align_experts`, `permute`.
- BatchNorm statistics of a blend: `refresh_statistics`.
- Coefficients of their own for parts of a model: `group_by_path`, `by_layer`.
- Other ways to one model: `best_expert`, `greedy_soup`, `loss_weights`, `fisher_merge`, `regmean_merge`.
"""

from glue_jax.merging.alignment import Alignment, Permutations, align, align_experts, permute
from glue_jax.merging.batch_norm import refresh_statistics
from glue_jax.merging.groups import Groups, by_layer, group_by_path
from glue_jax.merging.permutation_specs import Axis, PermutationSpec, chain_spec
from glue_jax.merging.regmean import conv_gram, layer_gram, regmean_merge
from glue_jax.merging.similarity import Similarity, loss_barriers, weight_similarity
from glue_jax.merging.soups import best_expert, diagonal_fisher, fisher_merge, greedy_soup, loss_weights

__all__ = [
    "Alignment",
    "Axis",
    "Groups",
    "PermutationSpec",
    "Permutations",
    "Similarity",
    "align",
    "align_experts",
    "best_expert",
    "by_layer",
    "chain_spec",
    "conv_gram",
    "diagonal_fisher",
    "fisher_merge",
    "greedy_soup",
    "group_by_path",
    "layer_gram",
    "loss_barriers",
    "loss_weights",
    "permute",
    "refresh_statistics",
    "regmean_merge",
    "weight_similarity",
]
