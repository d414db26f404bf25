"""`glue-jax blend`: experts with given coefficients, from files to files."""

import argparse
import math
import warnings
from collections.abc import Collection, Sequence

import numpy as np

from glue_jax.checkpoints import provenance
from glue_jax.checkpoints.adapters import save_adapter
from glue_jax.checkpoints.command_experts import inputs_of, open_experts
from glue_jax.checkpoints.formats import Checkpoint
from glue_jax.checkpoints.places import check_place
from glue_jax.checkpoints.progress import ProgressLine
from glue_jax.checkpoints.provenance import Coefficients, coefficients_for
from glue_jax.checkpoints.saving import blend_files
from glue_jax.checkpoints.sums import is_variance

# A sum of coefficients that is farther from 1 is taken for a mistake.
_MOST_FROM_ONE = 1e-3
_MOST_GROUPS = 20


def run(options: argparse.Namespace) -> None:
    """Blends experts with given coefficients, and writes the blend with its provenance."""
    experts, adapters = open_experts(options)
    coefficients = _given(len(experts), adapters.experts if adapters else experts[0].tensors, options)
    is_folder = adapters is not None or experts[0].format == "orbax"
    check_place(options.out, experts[0].num_bytes, options.overwrite, inputs_of(experts), is_folder=is_folder)
    made = provenance.record(provenance.identities(experts), coefficients)
    side_files = provenance.side_files(experts, made)
    if adapters:
        groups = dict(coefficients.rows)
        words = {"side_files": side_files, "overwrite": options.overwrite}
        save_adapter(options.out, adapters, coefficients.alpha, groups, **words)
    else:
        with ProgressLine("blend") as line:
            blend_files(
                experts,
                coefficients.of,
                options.out,
                take_first=options.take_first,
                side_files=side_files,
                overwrite=options.overwrite,
                on_progress=line.show,
            )
    is_sum = any(np.count_nonzero(alpha) > 1 for alpha in coefficients.alpha)
    if is_sum and any(map(is_variance, experts[0].tensors)):
        warnings.warn(
            "the experts have BatchNorm. The blend has the average of their running statistics, which fits no blend: "
            "measure the statistics anew, in PyTorch by torch.optim.swa_utils.update_bn, in JAX by "
            "glue_jax.merging.refresh_statistics",
            stacklevel=2,
        )
    print(_table(experts, coefficients))
    print(f"written: {options.out}")


def _given(k: int, names: Collection[str], options: argparse.Namespace) -> Coefficients:
    """Returns the coefficients that the options give, checked."""
    if options.weights_from:
        coefficients = provenance.read_coefficients(options.weights_from, names)
        if coefficients.alpha.shape[1] != k:
            raise ValueError(
                f"{options.weights_from} has coefficients of {coefficients.alpha.shape[1]} experts, but {k} are given"
            )
        return coefficients
    weights = [1 / k] * k if options.uniform else options.weights
    if len(weights) != k:
        raise ValueError(f"--weights has {len(weights)} numbers, but there are {k} experts; expected one for each")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"--weights is {weights}; expected finite numbers")
    if abs(sum(weights) - 1) > _MOST_FROM_ONE and not options.any_sum:
        raise ValueError(f"--weights has the sum {sum(weights):g}; expected 1 (--any-sum allows another sum)")
    return coefficients_for(names, weights)


def _table(experts: Sequence[Checkpoint], coefficients: Coefficients) -> str:
    """Returns the coefficients as lines of text, at most those of the first groups."""
    lines = []
    for name, alpha in list(zip(coefficients.names, coefficients.alpha, strict=True))[:_MOST_GROUPS]:
        lines.append(f"coefficients of {name}:")
        lines += [f"  {value:+.4f}  {one.path}" for value, one in zip(alpha, experts, strict=True)]
    return "\n".join(lines)
