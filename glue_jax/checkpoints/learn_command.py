"""`glue-jax learn`: learns the coefficients on target data, from files to files."""

import argparse
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import glue_jax
from glue_jax.checkpoints import kept_results, provenance
from glue_jax.checkpoints.formats import Checkpoint
from glue_jax.checkpoints.loading import check_alike, load_experts
from glue_jax.checkpoints.objective import Objective, load_objective
from glue_jax.checkpoints.progress import ProgressLine
from glue_jax.checkpoints.provenance import coefficients_for
from glue_jax.checkpoints.saving import check_place, save_blend
from glue_jax.merging.groups import Groups, by_layer, group_by_path
from glue_jax.types import LearnResult, Params, Progress


def run(experts: Sequence[Checkpoint], options: argparse.Namespace) -> None:
    """Learns the coefficients, and writes the best model with its provenance.

    The results so far are kept beside `--out`. A run that was stopped goes on from them.
    """
    check_alike(experts, options.take_first)
    check_place(options.out, experts[0].num_bytes, options.overwrite)
    objective = load_objective(options.objective)
    kept = options.out.with_name(f"{options.out.name}.state.npz")
    about = _about(experts, objective, options)
    known, seconds = _known(kept, about, options.fresh)
    bank = load_experts(experts, take_first=options.take_first, rename=objective.rename)
    groups = None if options.groups == "none" or objective.evaluate else _layers(bank)
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
            loss_fn=objective.loss_fn,
            validation_data=objective.validation_data,
            validation_fn=objective.validation_fn,
            evaluate=objective.evaluate,
            statistics_fn=objective.statistics_fn,
            collection=objective.collection,
            mean=objective.mean,
            var=objective.var,
            groups=groups,
            max_steps=options.max_steps,
            batch_size=options.batch_size,
            patience=options.patience,
            on_progress=keep,
            known=dict(known),
        )
    names = experts[0].tensors
    coefficients = coefficients_for(names, prior.alpha, groups if prior.groups else None, objective.rename)
    learned = {
        "chosen": prior.chosen,
        "values": {each.name: each.value for each in prior.candidates},
        "passes": {each.name: each.passes for each in prior.candidates},
        "steps": {name: int(result.state.step) for name, result in prior.stages.items()},
        "seed": options.seed,
        "objective": about["objective"],
        "data": about["data"],
        "statistics_refreshed": objective.statistics_fn is not None,
        "seconds": round(time.monotonic() - started, 1),
    }
    made = provenance.record(experts, coefficients, learned)
    save_blend(
        options.out,
        prior.params,
        like=experts[0],
        rename=objective.rename,
        side_files=provenance.side_files(experts, made, prior.report),
        overwrite=options.overwrite,
    )
    kept.unlink(missing_ok=True)
    print(prior.report)
    print(f"written: {options.out}")


def _layers(bank: Params) -> Groups:
    """Returns a group for each layer, or for each tensor if no name contains a layer."""
    try:
        return by_layer(bank)
    except ValueError:
        return group_by_path(bank, lambda path: path)


def _about(experts: Sequence[Checkpoint], objective: Objective, options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the coefficients depend on, as JSON."""
    files = [file for one in experts for file in dict.fromkeys(one.files.values())]
    data = hashlib.sha256()
    for leaf in jax.tree.leaves((objective.data, objective.validation_data)):
        data.update(f"{leaf.dtype}{leaf.shape}".encode())
        data.update(np.ascontiguousarray(leaf).view(np.uint8).data if leaf.size else b"")
    return {
        "experts": [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "objective": hashlib.sha256(options.objective.read_bytes()).hexdigest(),
        "data": data.hexdigest(),
        "options": [options.seed, options.groups, options.batch_size, options.max_steps, options.patience],
        "version": glue_jax.__version__,
    }


def _known(path: Path, about: dict[str, Any], fresh: bool) -> tuple[dict[str, LearnResult], float]:
    """Returns the results of a stopped run and its seconds, if there is one."""
    if not path.exists() or fresh:
        return {}, 0.0
    known, kept = kept_results.load(path)
    if differing := [name for name in about if about[name] != kept["about"].get(name)]:
        raise ValueError(
            f"{path} is of a stopped run with other {' and '.join(differing)}; expected the same, to go on from it, or "
            "--fresh, to begin anew"
        )
    return known, kept["seconds"]
