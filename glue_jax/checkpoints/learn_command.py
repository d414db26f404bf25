"""`glue-jax learn`: learns the coefficients on target data, from files to files."""

import argparse
import functools
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

import glue_jax
from glue_jax.checkpoints import kept_results, provenance
from glue_jax.checkpoints.adapters import Adapters, add_adapter, merge_adapters, save_adapter
from glue_jax.checkpoints.batch_checks import check_batches
from glue_jax.checkpoints.command_experts import inputs_of, open_experts
from glue_jax.checkpoints.formats import ADAPTER_CONFIG, Checkpoint, open_checkpoints
from glue_jax.checkpoints.loading import Rename, load_experts, nested
from glue_jax.checkpoints.objective import Objective, load_objective
from glue_jax.checkpoints.places import check_place, owned
from glue_jax.checkpoints.progress import ProgressLine
from glue_jax.checkpoints.provenance import coefficients_for
from glue_jax.checkpoints.saving import save_blend
from glue_jax.merging.groups import Groups, group_by_path
from glue_jax.objectives import OutputLoss
from glue_jax.priors.stages import stage_groups
from glue_jax.types import LearnResult, LossFn, Params, Progress, PyTree


def run(options: argparse.Namespace) -> None:
    """Learns the coefficients, and writes the best model with its provenance.

    The results so far are kept beside `--out`. A stopped run continues from them.
    """
    experts, adapters = open_experts(options)
    if (adapters is None) != (options.base is None):
        expected = "no --base, which only adapters of PEFT have" if adapters is None else "the base of adapters of PEFT"
        raise ValueError(f"--base is {options.base}; expected {expected}")
    base = [] if options.base is None else open_checkpoints([options.base])
    inputs = [*inputs_of(experts), *inputs_of(base), options.objective]
    is_folder = adapters is not None or experts[0].format == "orbax"
    check_place(options.out, experts[0].num_bytes, options.overwrite, inputs, is_folder=is_folder)
    with owned(options.out):
        _learn(experts, adapters, base, options)


def _learn(
    experts: Sequence[Checkpoint], adapters: Adapters | None, base: Sequence[Checkpoint], options: argparse.Namespace
) -> None:
    """Learns, and writes the best model. If there are results of a stopped run, learning continues from them."""
    objective = load_objective(options.objective)
    kept = kept_results.place(options.out)
    about = _about([*experts, *base], objective, options)
    known, seconds = _known(kept, about, options.fresh)
    loss_fn = _loss_for(options.estimator, objective)
    if objective.spec is not None and adapters is not None:
        raise ValueError(f"{options.objective} defines spec, but adapters of PEFT need no alignment; expected no spec")
    identities = provenance.identities(experts)
    if adapters is None:
        bank = load_experts(experts, take_first=options.take_first, rename=objective.rename)
        merge_fn, shared = glue_jax.blend, None
    else:
        bank, shared = adapters.experts, load_experts(base)
        merge_fn = _on_base(bool(adapters.configs[0].get("fan_in_fan_out")), objective.rename)
    spec = objective.spec and objective.spec(jax.tree.map(lambda leaf: leaf[0], bank))
    groups = None if options.groups == "none" or objective.evaluate else _groups(bank, adapters is not None)
    if loss_fn is not None:
        beside = {} if shared is None else {"shared": shared}
        one = functools.partial(merge_fn, min_dtype=np.float32, **beside)
        uniform = glue_jax.coefficients.uniform(glue_jax.num_experts(bank))
        check_batches(options.objective, objective, jax.eval_shape(one, bank, uniform), options.batch_size)
    if known:
        steps = {name: int(result.state.step) for name, result in known.items()}
        print(f"going on from {kept}, after the steps {steps}", file=sys.stderr)
    started = time.monotonic() - seconds
    with ProgressLine("learn") as line:

        def keep(stage: str, progress: Progress) -> None:
            known[stage] = progress.result
            kept_results.save(kept, known, {"about": about, "seconds": time.monotonic() - started})
            before = options.max_steps * (len(known) - 1)
            line.show(before + int(progress.result.state.step), options.max_steps * (1 if groups is None else 2))

        prior = glue_jax.build_prior(
            jax.random.key(options.seed),
            bank,
            objective.data,
            loss_fn=loss_fn,
            validation_data=objective.validation_data,
            validation_fn=objective.validation_fn,
            evaluate=objective.evaluate,
            spec=spec,
            statistics_fn=objective.statistics_fn,
            groups=groups,
            merge_fn=merge_fn,
            shared=shared,
            max_steps=options.max_steps,
            batch_size=options.batch_size,
            patience=options.patience,
            on_progress=keep,
            known=dict(known),
        )
    names = experts[0].tensors if adapters is None else bank
    rename = objective.rename if adapters is None else None
    coefficients = coefficients_for(names, prior.alpha, groups if prior.groups else None, rename)
    chosen = next(each for each in prior.candidates if each.name == prior.chosen)
    learned = {
        "chosen": prior.chosen,
        "estimator": "SPSA, by ask and tell" if loss_fn is None else _name_of(loss_fn),
        "aligned": prior.permutations is not None,
        "values": {each.name: each.value if math.isfinite(each.value) else None for each in prior.candidates},
        "passes": {each.name: each.passes for each in prior.candidates},
        "steps": {name: int(result.state.step) for name, result in prior.stages.items()},
        "seed": options.seed,
        "batch_size": options.batch_size,
        "base": None if options.base is None else str(options.base.absolute()),
        "objective": about["objective"],
        "data": about["data"],
        "statistics_refreshed": chosen.refreshed,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(prior.report)
    for index, one in enumerate(experts):
        print(f"expert {index} is {one.path}")
    made = provenance.record(identities, coefficients, learned)
    words = {"side_files": provenance.side_files(experts, made, prior.report), "overwrite": options.overwrite}
    if adapters is None:
        save_blend(options.out, prior.params, like=experts[0], rename=rename, **words)
    else:
        save_adapter(options.out, adapters, coefficients.alpha, dict(coefficients.rows), **words)
    kept.unlink(missing_ok=True)
    print(f"written: {options.out}")


def _loss_for(estimator: str, objective: Objective) -> LossFn | None:
    """Returns the loss in the form by which `build_prior` learns with this estimator. None with `evaluate`."""
    loss_fn = objective.loss_fn
    if estimator == "gauss-newton" and not isinstance(loss_fn, OutputLoss):
        raise ValueError("--estimator is gauss-newton; expected an objective with module or outputs")
    if estimator == "spsa" and isinstance(loss_fn, OutputLoss):
        return lambda params, batch: loss_fn(params, batch)
    return loss_fn


def _name_of(loss_fn: LossFn) -> str:
    """Returns the name of the estimator that learns by a loss."""
    return "Gauss-Newton" if isinstance(loss_fn, OutputLoss) else "SPSA"


def _on_base(fan_in_fan_out: bool, rename: Rename | None) -> Any:
    """Returns the merge of adapters that adds their blend to the base, `shared`, whose leaves are `[1, ...]`."""

    def merge(
        experts: Params, alpha: jax.Array, groups: PyTree = None, min_dtype: DTypeLike | None = None, *, shared: Params
    ) -> Params:
        adapter = merge_adapters(experts, alpha, groups, min_dtype=min_dtype)
        base = {name: leaf[0] for name, leaf in shared.items()}
        merged = add_adapter(base, adapter, fan_in_fan_out=fan_in_fan_out)
        return merged if rename is None else nested((rename(name), leaf) for name, leaf in merged.items())

    return merge


def _groups(bank: Params, is_adapters: bool) -> Groups | None:
    """Returns a group for each adapted module, or those of `build_prior`."""
    return group_by_path(bank, r"^(.*)[.]lora_") if is_adapters else stage_groups("layers", bank, glue_jax.blend)


def _about(read: Sequence[Checkpoint], objective: Objective, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the coefficients depend on, as JSON."""
    paths = [path for one in read for path in dict.fromkeys(one.files.values())]
    paths += [path.parent / ADAPTER_CONFIG for path in paths if (path.parent / ADAPTER_CONFIG).is_file()]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    data = hashlib.sha256()
    for leaf in jax.tree.leaves((objective.data, objective.validation_data)):
        data.update(f"{leaf.dtype}{leaf.shape}".encode())
        data.update(np.ascontiguousarray(leaf).view(np.uint8).data if leaf.size else b"")
    return {
        "experts": [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "objective": objective.digest,
        "data": data.hexdigest(),
        "options": [
            *(options.seed, options.groups, options.batch_size, options.max_steps, options.patience),
            *(options.subtree, list(options.take_first), options.estimator),
        ],
        "version": glue_jax.__version__,
    }


def _known(path: Path, about: dict[str, Any], fresh: bool) -> tuple[dict[str, LearnResult], float]:
    """Returns the results of a stopped run and its seconds, if there is one."""
    if not path.exists() or fresh:
        return {}, 0.0
    known, kept = kept_results.load(path)
    if differing := [name for name in about if about[name] != kept["about"].get(name)]:
        raise ValueError(
            f"{path} belongs to a stopped run with other {' and '.join(differing)}; expected the same to continue that "
            "run, or --fresh to begin anew"
        )
    return known, kept["seconds"]
