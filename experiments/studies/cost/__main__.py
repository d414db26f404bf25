"""The cost of an SPSA step and of a full-gradient step: time, compared with Eq. (9) and (10), memory and FLOPs.

    python -m experiments.studies.cost
    python -m experiments.studies.cost --networks resnet20 --batch-sizes 64 --num-experts 10 --num-directions 1

The first command takes 24 minutes on 2 CPU cores, most of them for MobileNetV2. It measures times, so leave the machine
alone meanwhile. It needs no data. It also shows the figures of `python -m experiments.studies.cost.tpu`, if they are in
the same folder.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.reporting.presentation import reported
from experiments.runtime.arguments import StageArguments
from experiments.runtime.progress import ProgressBars
from experiments.runtime.session import exit_on, process
from experiments.runtime.stages import machine
from experiments.studies.cost import tpu
from experiments.studies.cost.cost_report import present
from experiments.studies.cost.programs import Setting
from experiments.studies.cost.step_costs import measure
from experiments.studies.frame import command_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(StageArguments):
    """What a command line says.

    Attributes:
        networks: any of resnet20, mobilenetv2, vit, convnet.
        batch_sizes: the numbers of images in a minibatch.
        num_experts: values of K. The first is tried at every batch size, the others only at the smallest.
        num_directions: values of m. The first is tried at every batch size, the others only at the smallest.
        repetitions: the number of timed calls of each program.
        matmul_precision: the precision of the networks' products. The default is that of the experiments. A CPU has
            only one precision.
    """

    networks: tuple[str, ...] = ("resnet20", "mobilenetv2", "vit")
    batch_sizes: tuple[int, ...] = (64, 512)
    num_experts: tuple[int, ...] = (10, 2, 50)
    num_directions: tuple[int, ...] = (1, 4)
    repetitions: int = 9
    matmul_precision: Literal["highest", "high", "default"] = "highest"
    out_dir: Path = Path("runs") / "cost"

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        if self.repetitions < 1:
            raise ValueError(f"repetitions is {self.repetitions}; expected at least 1")
        for name in ("networks", "batch_sizes", "num_experts", "num_directions"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; expected at least one")
        self.settings()

    def settings(self) -> list[Setting]:
        """Returns the settings of the rows.

        Each network has each batch size, and at the smallest it also has other K and m.
        """
        k, m, small = self.num_experts[0], self.num_directions[0], min(self.batch_sizes)
        varied = [
            *((batch_size, k, m) for batch_size in sorted(self.batch_sizes)),
            *((small, other, m) for other in self.num_experts[1:]),
            *((small, k, other) for other in self.num_directions[1:]),
        ]
        return [
            Setting(
                network=network,
                batch_size=batch_size,
                num_experts=num_experts,
                num_directions=num_directions,
                matmul_precision=self.matmul_precision,
            )
            for network, (batch_size, num_experts, num_directions) in dict.fromkeys(
                itertools.product(self.networks, varied)
            )
        ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, and writes the report. `arguments` is the command line. None is that of this process.

    Returns:
        The results: `command`, `machine`, `arguments`, `rows` (see `experiments.studies.cost.step_costs.measure`), and
        `tpu` (what `experiments.studies.cost.tpu` found, or None).
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = command_line("studies.cost", words)
    parsed = tyro.cli(
        Arguments, prog="python -m experiments.studies.cost", description=(__doc__ or "").strip(), args=words
    )
    settings = parsed.settings()

    def work(progress: ProgressBars) -> dict[str, Any]:
        with exit_on(OSError, ValueError):
            compiled = tpu.read(parsed.out_dir)
        progress.say(f"{len(settings)} rows, {parsed.repetitions} calls of each program; {machine()}")
        return {
            "command": command,
            "machine": machine(),
            "arguments": {**dataclasses.asdict(parsed), "out_dir": str(parsed.out_dir)},
            "rows": measure(settings, parsed.repetitions, parsed.stages(progress), progress),
            "tpu": compiled,
        }

    return reported(parsed.out_dir, command, work, present)


if __name__ == "__main__":
    with process():
        main()
