"""The error of GLUE's gradient estimates on trained experts: against m, K and the radius, beside what theory says.

    python -m experiments.studies.variance
    python -m experiments.studies.variance --experiment cifar10 --examples 64 --probes 128 --averaged 1 2 5 10 20

The digits take about 3 minutes on 2 CPU cores, beside their experts. Experts are read from `--run-dir`, where the
experiment's own command keeps them (give it the same options). Those that are missing are trained first, by default at
the scale of the experiment's own default preset: the paper's, hours on a CPU, for cifar10.

One batch of target images is the loss, so that its gradient is known. At each point of the experts' hull the loss is
probed once along many random directions, which are then averaged by m: in alpha with the paper's scale, where its
section 4.2 is set, and in beta, through the softmax, with the unbiased scale, which GLUE learns with.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from rich.console import Console

from experiments.protocol import data
from experiments.protocol.context import Context, prepare
from experiments.protocol.expert_training import describe_missing
from experiments.protocol.presets import ExpertArguments, parse
from experiments.runtime.session import exit_on, process, session
from experiments.runtime.stages import machine
from experiments.studies.variance import variance_report as report
from experiments.studies.variance.estimate_errors import measure, number_of_directions
from experiments.studies.variance.settings import Settings, check
from experiments.studies.variance.variance_claims import claims


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    Attributes:
        settings: what to measure.
    """

    settings: tyro.conf.OmitArgPrefixes[Settings]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, from a command line to the report.

    Args:
        arguments: the command line; None is the process's.

    Returns:
        The results: of `experiments.studies.variance.estimate_errors.measure`, with `title`, `command` and `claims`.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(markup=False)
    with exit_on(ValueError):
        parsed = parse(Arguments, "studies.variance", __doc__ or "", words, settings=Settings())
        parsed.check()
    command = shlex.join(["python", "-m", "experiments.studies.variance", *words])
    with session(parsed.out_dir, console, command) as progress:
        with exit_on(ValueError, OSError, data.DatasetNotFoundError):
            dataset = data.load(parsed.config.dataset, parsed.data_dir, parsed.config.image_size)
            kept, accept = parsed.run_dir / "stages", parsed.accept_stages
            context = prepare(parsed.config, dataset, kept, progress, accept_stages=accept)
            check(context, parsed.settings)
        progress.say(_plan(context, parsed.settings))
        results = measure(context, parsed.settings, parsed.stages(progress))
        results["title"] = f"The error of the gradient estimates: {parsed.experiment}, preset {parsed.preset}"
        results["command"] = command
        results["claims"] = claims(results)
        report.write(results, parsed.out_dir)
    report.print_table(results, parsed.out_dir, console)
    return results


def _plan(context: Context, settings: Settings) -> str:
    """What is going to be done."""
    config = context.config
    training = (
        f"{describe_missing(context)}\nan expert: {config.expert_epochs} epochs of {config.expert_examples} images\n"
    )
    errors, radii = (2 * count for count in number_of_directions(config, settings))
    return (
        f"{context.dataset.name}; {machine()}\n{training}"
        f"forward passes of {settings.examples} images: errors {errors}, radii {radii}; learning at most "
        f"{config.alpha_steps} steps"
    )


if __name__ == "__main__":
    with process():
        main()
