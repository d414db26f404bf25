"""The error of GLUE's gradient estimates on trained experts, by m, K and the radius, and what theory says.

    python -m experiments.studies.variance
    python -m experiments.studies.variance --experiment cifar10 --examples 64 --probes 128 --averaged 1 2 5 10 20

The digits take about 3 minutes on 2 CPU cores, in addition to their experts. By default the experts have the scale of
the experiment's default preset. For cifar10 this is the paper's scale, which takes hours on a CPU.

The loss is that of one batch of target images, so its gradient is known. At each point of the experts' hull the loss is
probed once along many random directions. Then m directions at a time are averaged. In alpha the estimates have the
paper's scale, as in its section 4.2. In beta, through the softmax, they have the unbiased scale, with which GLUE
learns.
"""

import dataclasses
from typing import Any

import tyro

from experiments.protocol.context import Context
from experiments.protocol.expert_training import describe_missing
from experiments.protocol.presets import ExpertArguments
from experiments.runtime.session import exit_on, process
from experiments.runtime.stages import Stages
from experiments.studies import frame
from experiments.studies.variance.estimate_errors import measure, number_of_directions
from experiments.studies.variance.settings import Settings, check
from experiments.studies.variance.variance_report import present


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    Attributes:
        settings: what to measure.
    """

    settings: tyro.conf.OmitArgPrefixes[Settings] = dataclasses.field(default_factory=Settings)


def _measure(context: Context, parsed: Arguments, stages: Stages) -> dict[str, Any]:
    """Returns what `experiments.studies.variance.estimate_errors.measure` returns. It checks the settings first."""
    with exit_on(ValueError):
        check(context, parsed.settings)
    return measure(context, parsed.settings, stages)


def _plan(context: Context, parsed: Arguments) -> str:
    """Returns what is going to be done, in words."""
    errors, radii = (2 * count for count in number_of_directions(context.config, parsed.settings))
    return (
        f"{describe_missing(context)}\nforward passes of {parsed.settings.examples} images: errors {errors}, radii "
        f"{radii}; learning at most {context.config.alpha_steps} steps"
    )


main = frame.study(Arguments, _measure, present, title="The error of the gradient estimates", plan=_plan)

if __name__ == "__main__":
    with process():
        main()
