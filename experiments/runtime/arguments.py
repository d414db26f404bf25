"""What every command that keeps stages is told."""

import dataclasses
from pathlib import Path

from experiments.runtime.progress import ProgressBars
from experiments.runtime.stages import Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageArguments:
    """What a command line says of the command's folder.

    Attributes:
        out_dir: the command's folder: its report, and the finished stages that it goes on from.
        accept_stages: kinds of stages, for example `experts`, `coefficients`, `sizes`, `times`. A kept stage of such a
            kind, with the same settings and data, is taken even if other source code computed it, for example an older
            version. Each such stage is named. This is right if the source changed and the results would not.
    """

    out_dir: Path
    accept_stages: tuple[str, ...] = ()

    def stages(self, progress: ProgressBars) -> Stages:
        """Returns where the command keeps its own stages."""
        return Stages(self.out_dir / "stages", self.accept_stages, progress.say)
