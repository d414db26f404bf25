"""What each remedy gives a blend, alone and with others, before fine-tuning and after.

    python -m experiments.studies.ablation
    python -m experiments.studies.ablation --experiment cifar10 --initializations common --recipes "4 GLUE" "free
    coefficients"

The digits, all ways and both initialisations, take 10 minutes of one CPU core. Each way's coefficients and figures are
kept in the folder of the results, so an interrupted run goes on, and ways can be added.

Experts are read from `--run-dir`, where the experiment's own command keeps them (give it the same options); those that
are missing are trained.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from experiments.protocol import data
from experiments.protocol.config import Initialization
from experiments.protocol.context import prepare
from experiments.protocol.expert_training import describe_missing
from experiments.protocol.presets import ExpertArguments, parse
from experiments.runtime.session import exit_on, process, session
from experiments.runtime.stages import machine
from experiments.studies.ablation import ablation_report as report
from experiments.studies.ablation.recipes import Recipe, recipes
from experiments.studies.ablation.trials import measure

_MACHINES = "machine", "learned_on"
"""The fields of a row that name one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    Attributes:
        initializations: of the experts; `initialization` itself has no effect here.
        recipes: those of these names; a word that is none's name stands for all whose names contain it; none given are
            all.
        epochs: of fine-tuning; `fine-tuning-epochs` is the experiment's, whose own run Configs 1 to 4 are taken from.
    """

    initializations: tuple[Initialization, ...] = ("common", "separate")
    recipes: tuple[str, ...] = ()
    epochs: int = 5

    def __post_init__(self) -> None:
        """Refuses values out of their range.

        Raises:
            ValueError: with the field, its value, and what was expected.
        """
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}; expected at least 0")
        if not self.initializations or len(set(self.initializations)) < len(self.initializations):
            raise ValueError(f"initializations are {self.initializations}; expected at least one, each given once")
        self.chosen()

    def chosen(self) -> list[Recipe]:
        """Returns the recipes of these names, and those whose names contain a word that is none's name."""
        known = recipes(self.config)
        names = {recipe.name for recipe in known}
        chosen = set() if self.recipes else names
        for word in self.recipes:
            found = {word} & names or {name for name in names if word in name}
            if not found:
                raise ValueError(f"recipes has {word!r}; expected part of one of {[recipe.name for recipe in known]}")
            chosen |= found
        return [recipe for recipe in known if recipe.name in chosen]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, from a command line to the report.

    Args:
        arguments: the command line; None is the process's.

    Returns:
        The results: `title`, `command`, `machine`, and `sets`, for each initialisation what
        `experiments.studies.ablation.trials.measure` returns.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(markup=False)
    with exit_on(ValueError):
        parsed = parse(Arguments, "studies.ablation", __doc__ or "", words)
        parsed.check()
    sets = []
    command = shlex.join(["python", "-m", "experiments.studies.ablation", *words])
    with session(parsed.out_dir, console, command) as progress:
        with exit_on(ValueError, OSError, data.DatasetNotFoundError):
            dataset = data.load(parsed.config.dataset, parsed.data_dir, parsed.config.image_size)
            contexts = [
                prepare(
                    dataclasses.replace(parsed.config, initialization=initialization),
                    dataset,
                    parsed.run_dir / "stages",
                    progress,
                    accept_stages=parsed.accept_stages,
                )
                for initialization in parsed.initializations
            ]
        for context in contexts:
            # Experts of separate initialisations have no origin in common.
            is_common = context.config.initialization == "common"
            chosen = [recipe for recipe in parsed.chosen() if is_common or not recipe.task_vectors]
            progress.say(
                f"{dataset.name}, {context.config.initialization} initialisation; {machine()}\n"
                f"{describe_missing(context)}\n"
                f"{len(chosen)} recipes of {len(context.config.seeds)} seeds, each with {parsed.epochs} epochs of "
                "fine-tuning"
            )
            sets.append(measure(context, chosen, parsed.epochs, parsed.stages(progress)))
        results = {
            "title": f"Ways from experts to one model: {parsed.experiment}, preset {parsed.preset}",
            "command": command,
            "machine": "; ".join(
                sorted({row.get(of) or row["machine"] for found in sets for row in found["rows"] for of in _MACHINES})
            ),
            "sets": sets,
        }
        report.write(results, parsed.out_dir)
    report.print_tables(results, parsed.out_dir, console)
    return results


if __name__ == "__main__":
    with process():
        main()
