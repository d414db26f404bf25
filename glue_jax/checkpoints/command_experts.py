"""The experts that the words of a command name."""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from glue_jax.checkpoints.adapter_configs import read_config
from glue_jax.checkpoints.adapters import Adapters, load_adapters
from glue_jax.checkpoints.formats import ADAPTER_CONFIG, Checkpoint, open_checkpoints
from glue_jax.checkpoints.loading import check_alike


def open_experts(options: argparse.Namespace) -> tuple[Sequence[Checkpoint], Adapters | None]:
    """Opens the experts that the options of a command name, and reads them if they are adapters.

    Returns:
        The checkpoints, and the adapters if the checkpoints are some.

    Raises:
        ValueError: if an expert is given twice, if experts do not fit together, if some are adapters and others are
            not, or if an option has no meaning for adapters.
    """
    paths: Sequence[Path] = options.experts
    first: dict[Path, Path] = {}
    for path in paths:
        if (other := first.setdefault(path.resolve(), path)) is not path:
            raise ValueError(f"{path} and {other} are one expert; expected each expert once")
    adapters = [path for path in paths if (path / ADAPTER_CONFIG).is_file()]
    if not adapters:
        experts = open_checkpoints(
            paths[0] if len(paths) == 1 else paths, steps=options.steps, last=options.last, subtree=options.subtree
        )
        check_alike(experts, options.take_first)
        return experts, None
    if len(adapters) < len(paths):
        other = next(path for path in paths if path not in adapters)
        raise ValueError(f"{adapters[0]} is an adapter of PEFT, but {other} is not; expected experts of one kind")
    given = {"--subtree": options.subtree, "--steps": options.steps, "--last": options.last}
    given["--take-first"] = options.take_first
    for name, value in given.items():
        if value:
            raise ValueError(f"{name} is {value}, but has no meaning for adapters of PEFT; leave it out")
    base = None
    if getattr(options, "base", None) is not None:
        # The user says which base it is.
        names = [read_config(path).get("base_model_name_or_path") for path in paths]
        base = names[0]
        if len(set(names)) > 1:
            warnings.warn(f"the adapters name the bases {names}; {options.base} is taken for all of them", stacklevel=2)
    read = load_adapters(paths, base=base)
    return read.checkpoints, read


def inputs_of(experts: Sequence[Checkpoint]) -> list[Path]:
    """Returns the files and folders that a command reads, which its result must not change."""
    paths = [place for one in experts for place in one.places]
    return paths + [path.parent for path in paths if (path.parent / ADAPTER_CONFIG).is_file()]
