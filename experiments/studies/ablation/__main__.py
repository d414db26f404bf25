"""What each remedy gives a blend, alone and with others, before fine-tuning and after.

    python -m experiments.studies.ablation
    python -m experiments.studies.ablation --experiment cifar10 --initializations common --recipes "4 GLUE" "free
    coefficients"

For all ways and both initialisations, the digits take 15 minutes of one CPU core. The coefficients and the figures of
each way are kept in the folder of the results. So an interrupted run continues, and ways can be added.
"""

import dataclasses
from typing import Any

from experiments.protocol.config import Initialization
from experiments.protocol.context import Context
from experiments.protocol.expert_training import describe_missing
from experiments.protocol.presets import ExpertArguments
from experiments.runtime.session import process
from experiments.runtime.stages import Stages
from experiments.studies import frame
from experiments.studies.ablation.ablation_report import present
from experiments.studies.ablation.recipes import Recipe, recipes
from experiments.studies.ablation.trials import measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    Attributes:
        initializations: the initialisations of the experts. The option `initialization` has no effect here.
        recipes: names of recipes, or parts of names. A word that is no recipe's name stands for all recipes whose names
            contain it. The default is all recipes.
        epochs: the number of epochs of fine-tuning. `fine-tuning-epochs` is that of the experiment, from whose run
            Configs 1 to 4 are taken.
    """

    initializations: tuple[Initialization, ...] = ("common", "separate")
    recipes: tuple[str, ...] = ()
    epochs: int = 5

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        if self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}; expected at least 0")
        if not self.initializations or len(set(self.initializations)) < len(self.initializations):
            raise ValueError(f"initializations are {self.initializations}; expected at least one, each given once")
        self.chosen()

    def chosen(self) -> list[Recipe]:
        """Returns the recipes that the command line names."""
        known = {recipe.name: recipe for recipe in recipes(self.config)}
        return [known[name] for name in frame.chosen("recipes", self.recipes, known, whole=True)]


def _measure(context: Context, parsed: Arguments, stages: Stages) -> dict[str, Any]:
    """Returns `sets`: for each initialisation, what `experiments.studies.ablation.trials.measure` returns."""
    contexts = []
    for initialization in parsed.initializations:
        config = dataclasses.replace(parsed.config, initialization=initialization)
        contexts.append(frame.open_context(parsed, config, context.dataset, context.progress))
    sets = []
    for opened in contexts:
        initialization = opened.config.initialization
        opened.progress.say(f"{initialization} initialisation: {describe_missing(opened)}")
        # Experts of separate initialisations have no origin in common.
        chosen = [recipe for recipe in parsed.chosen() if initialization == "common" or not recipe.task_vectors]
        sets.append(measure(opened, chosen, parsed.epochs, stages))
    # A row names the machine that fine-tuned the model, and the one that learned the coefficients.
    rows = [row for found in sets for row in found["rows"]]
    machines = {row["machine"] for row in rows} | {row.get("learned_on") or row["machine"] for row in rows}
    return {"machine": "; ".join(sorted(machines)), "sets": sets}


main = frame.study(
    Arguments,
    _measure,
    present,
    title="Ways from experts to one model",
    plan=lambda context, parsed: f"{len(parsed.chosen())} recipes of {len(context.config.seeds)} seeds",
)

if __name__ == "__main__":
    with process():
        main()
