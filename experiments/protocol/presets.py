"""Finds the experiment of a command line, for the commands that use an experiment's experts."""

import argparse
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from experiments.protocol.config import Config
from experiments.runtime.arguments import StageArguments
from experiments.runtime.session import DEFAULT_EXPERIMENT

Parsed = TypeVar("Parsed", bound="ExpertArguments")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertArguments(StageArguments):
    """The options of a command that uses an experiment's experts.

    Attributes:
        experiment: the experiment whose experts are used. It is a module of `experiments` with presets, for example
            cifar10.
        preset: a preset of that experiment. It has the defaults of its fields. The default is its first preset.
        run_dir: the folder from which the experts are read. The experiment's own command keeps them there (give it the
            same options). Missing experts are trained. The default is the experiment's own folder.
        data_dir: the data directory of tensorflow-datasets; the default is its own (TFDS_DATA_DIR, or
            ~/tensorflow_datasets).
        config: every number of the experiment.
    """

    experiment: str
    preset: str
    run_dir: Path
    data_dir: str | None = None
    config: tyro.conf.OmitArgPrefixes[Config]

    def check(self) -> None:
        """Refuses options that no command can follow, before any work.

        Raises:
            ValueError: if the report would go into the experiment's own folder, or if there are too few experts.
        """
        if self.out_dir.resolve() == self.run_dir.resolve():
            raise ValueError(
                f"out_dir is {self.out_dir}, which is run_dir: expected another folder, or the report would be written "
                "over the experiment's own"
            )
        if self.config.num_experts < 2:
            raise ValueError(f"num_experts is {self.config.num_experts}; expected at least 2 for this command")


def parse(arguments: Callable[..., Parsed], command: str, description: str, words: Sequence[str]) -> Parsed:
    """Returns the options of a command line, with the defaults of its experiment's preset. The default is the digits.

    Args:
        arguments: `ExpertArguments`, or a class that adds fields to it.
        command: the module, without `experiments.`. The default of `out_dir` begins with the last part of its name.
        description: the text of `--help`.
        words: the words of the command line.

    Raises:
        ValueError: if the experiment has no presets, or if it does not have this preset.
    """
    prog = f"python -m experiments.{command}"
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--experiment", default=DEFAULT_EXPERIMENT)
    parser.add_argument("--preset")
    given = parser.parse_known_args(words)[0]
    presets = _presets(given.experiment)
    preset = given.preset or next(iter(presets))
    if preset not in presets:
        raise ValueError(f"preset is {preset!r}; expected one of {tuple(presets)}, those of {given.experiment}")
    folder = folder_of(given.experiment, preset, presets)
    default = arguments(
        experiment=given.experiment,
        preset=preset,
        run_dir=Path("runs") / folder,
        out_dir=Path("runs") / f"{command.rpartition('.')[2]}-{folder}",
        config=presets[preset],
    )
    return tyro.cli(type(default), prog=prog, description=description.strip(), args=list(words), default=default)


def folder_of(experiment: str, preset: str, presets: Mapping[str, Config]) -> str:
    """Returns the name of a run's folder: the experiment's name, and the preset's unless that is the first."""
    return experiment if preset == next(iter(presets)) else f"{experiment}-{preset}"


def _presets(experiment: str) -> Mapping[str, Config]:
    """Returns the presets of an experiment's module."""
    name = f"experiments.{experiment}"
    found = experiment.isidentifier() and importlib.util.find_spec(name) is not None
    presets = getattr(importlib.import_module(name), "PRESETS", None) if found else None
    if presets is None:
        raise ValueError(
            f"experiment is {experiment!r}; expected a module of experiments with PRESETS, as digits, cifar10"
        )
    return presets
