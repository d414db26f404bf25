"""Where a blend comes from: `glue.json`, a model card, and the recipe for mergekit."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import glue_jax
from glue_jax.checkpoints.formats import ADAPTER_CONFIG, Checkpoint, PathLike, open_checkpoint
from glue_jax.checkpoints.loading import Rename
from glue_jax.checkpoints.saving import CARD, PROVENANCE_KEY, RECIPE, RECORD
from glue_jax.merging.groups import Groups
from glue_jax.paths import by_path

_VERSIONED = ("jax", "numpy", "safetensors", "orbax-checkpoint", "torch", "torchax")


class Coefficients(NamedTuple):
    """The coefficients of K experts, for each of G groups of tensors.

    Attributes:
        names: the names of the groups.
        alpha: the coefficients, float64 `[G, K]`.
        rows: the number of the group of each tensor, by the tensor's name.
    """

    names: tuple[str, ...]
    alpha: np.ndarray
    rows: Mapping[str, int]

    def of(self, name: str) -> np.ndarray:
        """Returns the coefficients of one tensor, `[K]`."""
        return self.alpha[self.rows[name]]


def coefficients_for(
    names: Iterable[str], alpha: Any, groups: Groups | None = None, rename: Rename | None = None
) -> Coefficients:
    """Returns coefficients for tensors.

    Args:
        names: the names of the tensors in the experts' files.
        alpha: the coefficients, `[K]`, or `[G, K]` with groups.
        groups: the groups of the tree that `load_experts` returns. With None all tensors are one group.
        rename: the function that `load_experts` was given.
    """
    alpha = np.atleast_2d(np.asarray(alpha, np.float64))
    if groups is None:
        return Coefficients(("all",), alpha, dict.fromkeys(names, 0))
    rows = by_path(groups.rows)
    return Coefficients(groups.names, alpha, {name: rows[rename(name) if rename else name] for name in names})


def read_coefficients(path: PathLike, names: Collection[str]) -> Coefficients:
    """Reads the coefficients of an earlier blend, for experts with the same tensors.

    Args:
        path: a `glue.json`, the folder of a blend, or a blend in one safetensors file.
        names: the names of the tensors that will be blended.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no record of a blend, or if a tensor has no coefficients in it.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix == ".safetensors":
            text = json.loads(open_checkpoint(path).metadata[PROVENANCE_KEY])[RECORD]
        else:
            text = (path / RECORD if path.is_dir() else path).read_text()
        made = json.loads(text)
        groups = made["groups"]
        alpha = np.array([group["alpha"] for group in groups], np.float64)
        rows = {name: row for row, group in enumerate(groups) for name in group["tensors"]}
        labels = tuple(group["name"] for group in groups)
        if (made.get("learned") or {}).get("aligned"):
            raise ValueError("its experts were aligned, so its coefficients do not fit the files")
        if alpha.ndim != 2:
            raise ValueError("alpha is no list of numbers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no record of a blend ({reason}); expected a {RECORD}") from error
    if missing := [name for name in names if name not in rows]:
        raise ValueError(f"{path} has no coefficients for {missing[:5]}; expected those of every tensor of the experts")
    return Coefficients(labels, alpha, {name: rows[name] for name in names})


def identities(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Returns the path, the format and the hashes of each expert. This reads all files."""
    return [
        {"path": str(one.path.absolute()), "format": one.format, "sha256": one.sha256() | _config(one)}
        for one in checkpoints
    ]


def record(
    experts: Sequence[Mapping[str, Any]], coefficients: Coefficients, learned: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns what `glue.json` holds: the experts with their hashes, the coefficients, how they were found, versions.

    Args:
        experts: what `identities` returned before anything was learned. Another program may change a file later.
        coefficients: the coefficients of the blend.
        learned: what is known of the learning, such as the estimator, the seed, the passes and the losses. None if the
            coefficients were given.
    """
    tensors: dict[int, list[str]] = {}
    for name, row in coefficients.rows.items():
        tensors.setdefault(row, []).append(name)
    return {
        "experts": list(experts),
        "groups": [
            {"name": coefficients.names[row], "alpha": coefficients.alpha[row].tolist(), "tensors": names}
            for row, names in sorted(tensors.items())
        ],
        "learned": dict(learned) if learned else None,
        "versions": {"glue_jax": glue_jax.__version__, "python": platform.python_version()} | _versions(),
    }


def side_files(checkpoints: Sequence[Checkpoint], made: Mapping[str, Any], report: str = "") -> dict[str, str]:
    """Returns the texts of the files beside a blend, by the names of the files.

    Args:
        checkpoints: the experts.
        made: what `record` returned.
        report: Markdown for the model card, such as the report of `build_prior`.
    """
    files = {RECORD: json.dumps(made, indent=2, allow_nan=False) + "\n", CARD: _card(checkpoints, made, report)}
    return files | ({RECIPE: mergekit_recipe(checkpoints, made)} if _mergekit_makes(checkpoints, made) else {})


def mergekit_recipe(checkpoints: Sequence[Checkpoint], made: Mapping[str, Any]) -> str:
    """Returns the recipe, in YAML, by which `mergekit-yaml` makes the same blend.

    mergekit takes the first filter that is a part of the tensor's name. So a longer name comes before its own parts.
    """
    groups = made["groups"]
    # The largest group needs no filters.
    *filtered, rest = sorted(groups, key=lambda group: len(group["tensors"]))
    pairs = [(name, group) for group in filtered for name in group["tensors"]]
    # A name of the largest group that contains another group's name needs a filter too.
    pairs += [(name, rest) for name in rest["tensors"] if any(other in name for other, _ in pairs)]
    pairs.sort(key=lambda pair: -len(pair[0]))
    lines = ["merge_method: linear", "models:"]
    for index, checkpoint in enumerate(checkpoints):
        lines += [f"  - model: {json.dumps(str(checkpoint.path.absolute()))}", "    parameters:"]
        values = [f"{{filter: {json.dumps(name)}, value: {_number(group['alpha'][index])}}}" for name, group in pairs]
        if values:
            lines += ["      weight:", *(f"        - {value}" for value in values)]
            lines += [f"        - {{value: {_number(rest['alpha'][index])}}}"]
        else:
            lines += [f"      weight: {_number(rest['alpha'][index])}"]
    lines += ["parameters:", "  normalize: false", "dtype: float32"]
    return "\n".join([*lines, f"out_dtype: {_dtypes(checkpoints)[0]}"]) + "\n"


def _dtypes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Returns the names of the dtypes of the tensors."""
    return sorted({np.dtype(tensor.dtype).name for tensor in checkpoints[0].tensors.values()})


def _mergekit_makes(checkpoints: Sequence[Checkpoint], made: Mapping[str, Any]) -> bool:
    """Returns whether mergekit makes the same model: from folders of Hugging Face, if it is a plain blend.

    mergekit writes one dtype, and blends integers too.
    """
    learned = made["learned"] or {}
    is_plain = not (learned.get("statistics_refreshed") or learned.get("aligned"))
    is_plain = is_plain and _dtypes(checkpoints) in (["bfloat16"], ["float16"], ["float32"])
    return is_plain and all((one.path / "config.json").is_file() and one.format != "orbax" for one in checkpoints)


def _card(checkpoints: Sequence[Checkpoint], made: Mapping[str, Any], report: str) -> str:
    """Returns the model card: front matter of Hugging Face, the experts, and their coefficients."""
    groups = made["groups"]
    shown = groups if len(groups) <= 8 else []
    is_known = (checkpoints[0].path / "config.json").is_file()
    library = ["library_name: transformers"] if is_known else []
    lines = ["---", *library, "tags:", "- merge", "- glue-jax", "---", "", "# A blend of experts", ""]
    lines += ["Each weight is the sum of the experts' weights, times the coefficients below."]
    lines += ["", "| expert |" + "".join(f" {group['name']} |" for group in shown), "| --- |" + " ---: |" * len(shown)]
    for index, name in enumerate(_names(checkpoints)):
        lines.append(f"| {index} {name} |" + "".join(f" {group['alpha'][index]:.4f} |" for group in shown))
    if not shown:
        lines += ["", f"There are {len(groups)} groups of tensors. Their coefficients are in `{RECORD}`."]
    lines += [
        "",
        "The coefficients were learned by `glue-jax learn`." if made["learned"] else "The coefficients were given.",
    ]
    if (made["learned"] or {}).get("statistics_refreshed"):
        lines += ["BatchNorm's statistics are no such sum: they were estimated anew on the target data."]
    if (made["learned"] or {}).get("aligned"):
        lines += ["The experts' units were permuted before, so that like units are blended."]
    lines += [f"`{RECORD}` holds the hash of each expert and all coefficients."]
    if _mergekit_makes(checkpoints, made):
        lines += [f"`mergekit-yaml {RECIPE} OUT` makes the same blend with mergekit."]
    return "\n".join([*lines, "", report]).rstrip() + "\n"


def _config(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns the hash of an adapter's configuration, which holds its scaling."""
    path = checkpoint.path.parent / ADAPTER_CONFIG
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else {}


def _names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Returns a short name for each expert: the part of its path that distinguishes it from the others."""
    paths = [one.path.absolute() for one in checkpoints]
    same = Path(os.path.commonpath(paths))
    names = [path.relative_to(same).as_posix() if path != same else path.name for path in paths]
    return [name.replace("|", "\\|") for name in names]


def _number(value: float) -> str:
    """Returns a number as YAML reads it: `1e-05` would be text there."""
    return repr(value) if "e" not in repr(value) else f"{value:.17e}"


def _versions() -> dict[str, str]:
    """Returns the versions of the libraries that a blend depends on, if they are installed."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
