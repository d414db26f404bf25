"""Reads and checks the configurations of LoRA adapters of PEFT, and makes the configuration of a blend.

The rules are those of PEFT 0.21 (https://github.com/huggingface/peft, `peft/tuners/lora`).
"""

import collections
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from glue_jax.checkpoints.formats import ADAPTER_CONFIG

AdapterConfig: TypeAlias = Mapping[str, Any]
"""The content of `adapter_config.json`."""

REFUSED = {
    "use_dora": "DoRA also trains the length of each weight's columns, so its change is no product of two factors",
    "modules_to_save": "it holds whole trained modules besides the factors",
    "trainable_token_indices": "it holds trained embeddings of tokens besides the factors",
    "lora_bias": "it holds trained biases besides the factors",
    "layer_replication": "it repeats layers of the base, so its base is another model",
    "target_parameters": "it changes parameters that are no weights of modules, and stores their factors otherwise",
    "ensure_weight_tying": "its factors are shared between the embedding and the head",
    "alora_invocation_tokens": "aLoRA changes the weights for some tokens only",
    "use_qalora": "QALoRA averages the input over groups, so its change is no product of two factors",
    "use_bdlora": "BD-LoRA has factors of blocks, which do not concatenate",
    "arrow_config": "Arrow chooses adapters for each token",
    "kasa_config": "KaSA changes the base, and has a third factor",
    "monteclora_config": "MonteCLoRA adds random numbers to the factors",
    "velora_config": "VeLoRA holds a projection besides the factors",
    "megatron_config": "Megatron's layers split the factors among devices",
}
"""The entries that are refused, and why."""
# Initialisations that leave the base as it is.
_PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
# Initialisations that change the base, and how.
_BASE_CHANGING_STARTS = {
    "pissa": "PiSSA subtracts the first factors from the base",
    "olora": "OLoRA subtracts the first factors from the base",
    "corda": "CorDA subtracts the first factors from the base",
    "lora_ga": "LoRA-GA subtracts the first factors from the base",
    "loftq": "LoftQ quantizes the base",
}
# These say where the factors apply. A configuration may give all of them.
_SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
KNOWN = frozenset(
    {
        *_SELECTION,
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora"),
        *("init_lora_weights", "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
    }
)
"""The entries that are read here, or change no weight."""
_UNUSED_STARTS = {"loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None}


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the configuration of an adapter, and refuses an adapter whose change of a weight is not `s B A`.

    Args:
        folder: the folder of the adapter.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: if there is no configuration.
        ValueError: if it is no configuration of LoRA, or if it has something that cannot be blended; the error names
            the entry, its value and the reason.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_CONFIG}; expected the folder of an adapter of PEFT")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path} has peft_type {kind!r}; expected 'LORA'")
    for entry, reason in REFUSED.items():
        if config.get(entry):
            raise ValueError(f"{path} has {entry}={config[entry]!r}, which cannot be blended: {reason}")
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{path} has bias={config['bias']!r}, which cannot be blended: it holds trained biases of the base"
        )
    _check_start(path, config.get("init_lora_weights", True))
    if unknown := {entry: value for entry, value in config.items() if value and entry not in KNOWN | REFUSED.keys()}:
        raise ValueError(
            f"{path} has {', '.join(f'{entry}={value!r}' for entry, value in unknown.items())}, which is unknown here. "
            "If it does not change what the adapter computes, remove it from the file"
        )
    for entry in ("r", "lora_alpha"):
        value = config.get(entry)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path} has {entry}={value!r}; expected a number")
    for entry in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(entry) or {}:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{path} has the key {pattern!r} in {entry}, which is no pattern: {error}") from error
    return config


def common_base(paths: Sequence[Path], configs: Sequence[AdapterConfig], base: str | None) -> str | None:
    """Returns the name of the base that all adapters share.

    Args:
        paths: the folders of the adapters.
        configs: their configurations.
        base: the name that replaces those of the configurations. None compares them.

    Raises:
        ValueError: if two adapters have different bases, or different revisions of one base; the error names both.
        ValueError: if adapters disagree on `fan_in_fan_out`.
    """
    entries = ("base_model_name_or_path", "revision") if base is None else ()
    for entry in (*entries, "fan_in_fan_out"):
        first = configs[0].get(entry) or None
        for path, config in zip(paths, configs, strict=True):
            other = config.get(entry) or None
            if other != first:
                same = f". If it is the same base, make {entry} equal in each {ADAPTER_CONFIG}"
                advice = "" if entry == "fan_in_fan_out" else f"{same}, or pass base (learn --base)"
                raise ValueError(
                    f"{path} has {entry}={other!r}, but {paths[0]} has {first!r}; expected one base for all adapters"
                    f"{advice}"
                )
    return configs[0].get("base_model_name_or_path") if base is None else base


def rank_of(config: AdapterConfig, module: str) -> int:
    """Returns the rank of a module of the base, by its name there."""
    return _by_pattern(config.get("rank_pattern"), module, config["r"])


def scaling_of(config: AdapterConfig, module: str) -> float:
    """Returns the scaling of a module: alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732)."""
    rank = rank_of(config, module)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def blended_config(configs: Sequence[AdapterConfig], ranks: Mapping[str, int], base: str | None) -> dict[str, Any]:
    """Returns the configuration of a blend whose scaling is 1 in every module.

    Args:
        configs: the configurations of the adapters. The first one gives all entries that have nothing to do with
            blending, such as `task_type`.
        ranks: the rank of the blend in each module, by the module's name in the base.
        base: the name of the base.
    """
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes the first key that matches the end of a name. This one matches one whole name.
    pattern = {f"^{re.escape(module)}": other for module, other in ranks.items() if other != rank}
    result = {
        **configs[0],
        **{entry: value for entry, value in _UNUSED_STARTS.items() if entry in configs[0]},
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }
    if any(_selection(config) != _selection(configs[0]) for config in configs):
        result |= dict.fromkeys(_SELECTION) | {"target_modules": sorted(ranks)}
    return result


def _check_start(path: Path, start: Any) -> None:
    """Refuses an initialisation of the factors that changes the base."""
    name = str(start).lower()
    if name in _PLAIN_STARTS:
        return
    how = next((text for prefix, text in _BASE_CHANGING_STARTS.items() if name.startswith(prefix)), None)
    if how is None:
        raise ValueError(f"{path} has init_lora_weights={start!r}; expected one of {', '.join(_PLAIN_STARTS)}")
    advice = (
        ""
        if name.startswith("loftq")
        else ". To convert it to plain LoRA, save it by save_pretrained(..., path_initial_model_for_weight_conversion=)"
    )
    raise ValueError(
        f"{path} has init_lora_weights={start!r}, which cannot be blended: {how}, so the adapter belongs to another "
        f"base{advice}"
    )


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a module's name, as PEFT's get_pattern_key."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _selection(config: AdapterConfig) -> list[Any]:
    """Returns where the factors apply. PEFT writes sets as lists, in any order."""
    values = [config.get(entry) for entry in _SELECTION]
    return [sorted(value) if isinstance(value, list) else value for value in values]
