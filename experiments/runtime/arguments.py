"""The options of every command that keeps stages."""

import dataclasses
from pathlib import Path

from experiments.runtime.progress import ProgressBars
from experiments.runtime.stages import Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageArguments:
    """The options for the folder of a command.

    Attributes:
        out_dir: the folder of the command. It has the report, and the finished stages that the command continues from.
        accept_stages: kinds of stages, for example `experts`, `coefficients`, `sizes`, `times`. A kept stage of such a
            kind is taken even if other source code computed it, for example an older version. It must have the same
            settings and data. The command names each such stage. Use this if the source changed in a way that does not
            change the results.
    """

    out_dir: Path
    accept_stages: tuple[str, ...] = ()

    def stages(self, progress: ProgressBars) -> Stages:
        """Returns the stages of the command."""
        return Stages(self.out_dir / "stages", self.accept_stages, progress.say)
