"""Tools that compare and align experts before a blend, repair the blend after it, or merge experts in other ways.

- Are the experts alike? `weight_similarity` and `loss_barriers` tell.
- Are the hidden units in another order? `chain_spec`, `align`, `align_experts` and `permute` put them in one order.
- Are the BatchNorm statistics of the blend wrong? `refresh_statistics` computes new ones.
- Should parts of the model have their own coefficients? `group_by_path` and `by_layer` make groups.
- Is there another way to one model? `best_expert`, `greedy_soup`, `loss_weights`, `fisher_merge` and `regmean_merge`.
"""

from glue_jax.merging.alignment import Alignment, Permutations, align, align_experts, permute
from glue_jax.merging.batch_norm import refresh_statistics
from glue_jax.merging.groups import Groups, by_layer, group_by_path
from glue_jax.merging.permutation_specs import Axis, KernelLayout, PermutationSpec, Segment, chain_spec
from glue_jax.merging.regmean import conv_gram, layer_gram, regmean_merge
from glue_jax.merging.similarity import Similarity, loss_barriers, weight_similarity
from glue_jax.merging.soups import best_expert, diagonal_fisher, fisher_merge, greedy_soup, loss_weights

__all__ = [
    "Alignment",
    "Axis",
    "Groups",
    "KernelLayout",
    "PermutationSpec",
    "Permutations",
    "Segment",
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
