"""The command line that the experiments share."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments.protocol import data
from experiments.protocol import run as protocol
from experiments.protocol.coefficients import make_steps
from experiments.protocol.config import CONFIGS, Config
from experiments.protocol.context import Context, prepare
from experiments.protocol.estimate import describe, estimate
from experiments.protocol.expert_training import describe_missing
from experiments.protocol.presets import folder_of
from experiments.reporting import run_report
from experiments.reporting.presentation import reported
from experiments.runtime.arguments import StageArguments
from experiments.runtime.progress import ProgressBars
from experiments.runtime.session import exit_on
from experiments.runtime.stages import machine, naming, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(StageArguments):
    """What a command line says.

    Attributes:
        preset: a set of defaults for all other options. The presets are named above.
        data_dir: the data directory of tensorflow-datasets; the default is its own (TFDS_DATA_DIR, or
            ~/tensorflow_datasets).
        config: every number of the protocol.
    """

    preset: str
    data_dir: str | None = None
    config: tyro.conf.OmitArgPrefixes[Config]


def main(
    name: str, description: str, presets: Mapping[str, Config], arguments: Sequence[str] | None = None
) -> dict[str, Any]:
    """Runs one experiment from a command line to its report.

    Args:
        name: the name of the experiment, and of its folder under `runs/`.
        description: the text of `--help`.
        presets: sets of defaults, by name. The first one is the default.
        arguments: the command line. None is that of this process.

    Returns:
        The results.
    """
    parsed = _parse(name, description, presets, arguments)
    config = parsed.config

    def work(progress: ProgressBars) -> dict[str, Any]:
        with exit_on(ValueError, OSError, data.DatasetNotFoundError):
            if config.num_experts < 2:
                raise ValueError(f"num_experts is {config.num_experts}; expected at least 2 to blend")
            dataset = data.load(config.dataset, parsed.data_dir, config.image_size)
            stages = parsed.out_dir / "stages"
            context = prepare(config, dataset, stages, progress, accept_stages=parsed.accept_stages)
        progress.say(_plan(context))
        with naming("estimate of the time"):
            progress.say(describe(estimate(context)))
        results = protocol.run(context)
        results["experiment"] = name
        results["title"] = _title(name, parsed.preset, presets[parsed.preset], config)
        write_json(parsed.out_dir / "config.json", results["config"])
        return results

    return reported(parsed.out_dir, f"python -m experiments.{name}", work, run_report.present)


def _plan(context: Context) -> str:
    """Returns what a run is going to do, in words."""
    config, dataset = context.config, context.dataset
    expert_steps = config.expert_epochs * (config.expert_examples // config.expert_batch_size)
    target = len(context.targets[config.seeds[0]])
    tuning_steps = config.fine_tuning_epochs * (target // config.fine_tuning_batch_size)
    images = f"{len(dataset.train.labels)} training and {len(context.test.labels)} test images"
    devices = jax.device_count()
    whole = sorted(
        {
            batch_size
            for batch_size in (config.expert_batch_size, config.alpha_batch_size, config.fine_tuning_batch_size)
            if batch_size % devices
        }
    )
    note = f"\nnot divided by {devices} devices, so computed whole by each: minibatches of {whole}" if whole else ""
    if target < config.target_examples:
        note += f"\ntarget_examples is {config.target_examples}, of which {target} are left and used"
    return (
        f"{dataset.name}, {images}; {machine()}{note}\n{describe_missing(context)}\n"
        f"training steps: {config.num_experts} experts x {expert_steps}; coefficients: "
        f"{len(make_steps(config))} Configs x {len(config.seeds)} seeds x at most {config.alpha_steps}; fine-tuning: "
        f"{len(CONFIGS)} Configs x {len(config.seeds)} seeds x {tuning_steps}"
    )


def _title(name: str, preset: str, defaults: Config, config: Config) -> str:
    """Returns the experiment, its preset, and the fields that differ from the preset."""
    changed = [
        f"{field.name} {getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(defaults, field.name)
    ]
    return ", ".join([name, f"preset {preset}", *changed])


def _parse(name: str, description: str, presets: Mapping[str, Config], arguments: Sequence[str] | None) -> Arguments:
    """Returns the options of a command line, with the defaults of its preset."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first_pass = argparse.ArgumentParser(prog=f"python -m experiments.{name}", add_help=False, allow_abbrev=False)
    first_pass.add_argument("--preset", choices=list(presets), default=next(iter(presets)))
    preset = first_pass.parse_known_args(arguments)[0].preset
    return tyro.cli(
        Arguments,
        prog=first_pass.prog,
        description=f"{description.strip()}\n\nPresets: {', '.join(presets)}.",
        args=list(arguments),
        default=Arguments(
            preset=preset, out_dir=Path("runs") / folder_of(name, preset, presets), config=presets[preset]
        ),
    )
