"""The command line that the experiments share."""

import argparse
import dataclasses
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console

from experiments import data, protocol, report
from experiments.config import Config
from experiments.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a command line says.

    Attributes:
        preset: a set of defaults for all that follows; see above.
        out_dir: the run's folder: its report, and what it goes on from.
        data_dir: the data directory of tensorflow-datasets; the default is its own (TFDS_DATA_DIR, or
            ~/tensorflow_datasets).
        config: every number of the protocol.
    """

    preset: str
    out_dir: Path
    data_dir: str | None = None
    config: tyro.conf.OmitArgPrefixes[Config]


def main(
    name: str, description: str, presets: Mapping[str, Config], arguments: Sequence[str] | None = None
) -> dict[str, Any]:
    """Runs one experiment from a command line to its report.

    Args:
        name: of the experiment, and of its folder under `runs/`.
        description: what `--help` says.
        presets: sets of defaults by name, the first the default.
        arguments: the command line; None is the process's.

    Returns:
        The results.
    """
    parsed = _parse(name, description, presets, arguments)
    config = parsed.config
    console = Console()
    try:
        dataset = data.load(config.dataset, parsed.data_dir)
        console.print(
            f"{name}: {dataset.name}, {len(dataset.train.labels)} training and {len(dataset.test.labels)} test images; "
            f"{machine()}",
            highlight=False,
            soft_wrap=True,
        )
        with Progress(console) as progress:
            results = protocol.run(config, dataset, parsed.out_dir / "stages", progress)
    except (ValueError, FloatingPointError, data.DatasetNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    results |= {"title": f"{name}, preset {parsed.preset}", "machine": machine()}
    report.write(results, parsed.out_dir)
    report.print_table(results, parsed.out_dir, console)
    return results


def machine() -> str:
    """Returns what this process computes on."""
    devices = jax.devices()
    kind = (
        f"{os.cpu_count()} CPU cores" if devices[0].platform == "cpu" else f"{len(devices)} x {devices[0].device_kind}"
    )
    return f"{kind}, JAX {jax.__version__}, Python {platform.python_version()}"


def _parse(name: str, description: str, presets: Mapping[str, Config], arguments: Sequence[str] | None) -> Arguments:
    """The command line over the defaults of its preset."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first_pass = argparse.ArgumentParser(prog=f"python -m experiments.{name}", add_help=False, allow_abbrev=False)
    first_pass.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    preset = first_pass.parse_known_args(arguments)[0].preset
    return tyro.cli(
        Arguments,
        prog=first_pass.prog,
        description=description,
        args=list(arguments),
        default=Arguments(preset=preset, out_dir=Path("runs") / name, config=presets[preset]),
    )
