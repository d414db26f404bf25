r"""What to do with the last checkpoints of one training run? Test accuracy and loss of several ways to blend them.

    python -m experiments.studies.last_checkpoints
    python -m experiments.studies.last_checkpoints --experiment cifar10 --expert-examples 6000 --expert-epochs 30 \
        --target-examples 2000 --alpha-batch-size 128 --alpha-steps 60 --patience 4

A network is trained once for each seed, at a constant learning rate. orbax writes a checkpoint after each of the last
`--num-experts` epochs. `glue_jax.checkpoints.load_experts` reads them as experts. Their coefficients are learned on
`--target-examples` images that the network was not trained on, or on its training images. These blends are compared
with the last checkpoint, with the uniform average of the last k checkpoints, and with moving averages of the weights.
The validation images choose k, the moving average, and the step at which learning ends.

Every blend gets BatchNorm's statistics from training images. The coefficients are learned with BatchNorm by the
minibatch. The training and the result of each way are kept, so a stopped run continues.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.protocol.config import CoefficientFields, FineTuningFields, part
from experiments.protocol.context import Context
from experiments.protocol.presets import ExpertArguments
from experiments.reporting.presentation import Report, TableCells, grouped, markdown_table, page, spread
from experiments.runtime.session import process
from experiments.runtime.sources import functions_in
from experiments.runtime.stages import Stages
from experiments.studies import frame
from experiments.studies.checkpoint_blends import WAYS, Choice, Run
from experiments.studies.frame import slug
from experiments.studies.numerics import drawn_together
from experiments.studies.sharing import coefficients
from experiments.studies.training_run import draw_images, load_average, load_models, train_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    `expert-examples`, `expert-epochs` and the other options for experts are those of the one run. `concentration`,
    `initialization` and `run-dir` have no effect.

    Attributes:
        decays: the decays of the moving averages of the parameters, for each step of training.
        ways: the ways whose names contain one of these words. The default is all ways.
    """

    decays: tuple[float, ...] = (0.99, 0.997, 0.999)
    ways: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        if not self.decays or len(set(self.decays)) < len(self.decays) or not all(0 < d < 1 for d in self.decays):
            raise ValueError(f"decays are {self.decays}; expected at least one, each between 0 and 1 and given once")
        frame.chosen("ways", self.ways, WAYS)
        if self.config.num_experts > self.config.expert_epochs:
            raise ValueError(
                f"num_experts is {self.config.num_experts}, and expert_epochs is {self.config.expert_epochs}; expected "
                "a checkpoint for at most each epoch"
            )


def measure(context: Context, parsed: Arguments, stages: Stages) -> dict[str, Any]:
    """Trains and measures what is not kept yet.

    Returns:
        A dict. `data` is the name of the data set. `distances` has a number for each seed: the root mean square
            distance of the checkpoints from their mean, divided by the length of the mean. `training_loss` is by seed
            and epoch. `rows` has a row for each way and seed, with `way`, `seed`, `chosen`, `alpha` (`[K]` or None),
            `accuracy` and `loss` on the test images (a fraction and nats), `validation_loss`, `seconds` and `machine`.
            `decays` are the arguments'.

    Raises:
        ValueError: if there are fewer images than asked for.
        FloatingPointError: if a training loss is infinite or NaN.
        DamagedStageError: if a checkpoint is not what was written.
    """
    config, decays = context.config, list(parsed.decays)
    settings = {**context.bank_fields, "decays": decays}
    settings["target_examples"] = config.target_examples
    training = {**settings, "code": context.code(draw_images, train_run)}
    images = {seed: draw_images(context, seed) for seed in config.seeds}
    bar = context.progress.stage("Epochs", len(config.seeds) * config.expert_epochs)
    trained: dict[int, tuple[Path, dict[str, Any]]] = {}
    for seed in config.seeds:
        key = f"training/seed{seed}", {**training, "seed": seed}
        folder, done = stages.path(*key), stages.read(*key)
        if done is None or not folder.is_dir():
            done = stages.write(*key, train_run(context, images[seed], seed, decays, folder, bar))
            context.progress.say(f"seed {seed}: training loss {done['training_loss'][-1]:.3f} in the last epoch")
        else:
            bar.skip(config.expert_epochs)
        trained[seed] = folder, done
    ways = frame.chosen("ways", parsed.ways, WAYS)
    bar = context.progress.stage("Seeds, ways", len(config.seeds) * len(ways))
    rows, distances = [], []
    for seed, (folder, done) in trained.items():
        models = load_models(context, folder, done)
        averages = {decay: load_average(context, folder, decay) for decay in decays}
        run = Run(context, seed, images[seed], models, averages, coefficients(context, models, "free"))
        distances.append(drawn_together(models, 1.0)[1])
        for way in ways:
            depends_on = {**settings, **part(config, CoefficientFields, FineTuningFields), "seed": seed, "way": way}
            depends_on["training"] = done["checksums"]
            depends_on["code"] = context.code(
                _measure, Run, load_models, load_average, coefficients, *functions_in(WAYS[way])
            )
            row = stages.run(f"ways/{slug(way)}-seed{seed}", depends_on, functools.partial(_measure, run, WAYS[way]))
            rows.append({"way": way, "seed": seed, **row})
            bar.advance()
            context.progress.say(
                f"seed {seed}, {way}: test accuracy {100 * row['accuracy']:.2f} %, loss {row['loss']:.4f} "
                f"({row['chosen']})"
            )
    losses = [done["training_loss"] for _, done in trained.values()]
    found = {"data": context.dataset.name, "decays": decays, "distances": distances, "training_loss": losses}
    return {**found, "rows": rows}


def _measure(run: Run, way: Callable[[Run], Choice]) -> dict[str, Any]:
    """Returns the loss and the accuracy of a way's model on the test images, with what belongs to them."""
    choice = way(run)
    return {
        **run.context.evaluate(choice.variables, run.context.test),
        "validation_loss": run.context.evaluate(choice.variables, run.context.validation)["loss"],
        "chosen": choice.chosen,
        "alpha": None if choice.alpha is None else np.asarray(choice.alpha).tolist(),
    }


def table(results: Mapping[str, Any]) -> TableCells:
    """Returns a row for each way: test accuracy, test loss, and what validation chose for each seed."""
    body = []
    for way, own in grouped(results["rows"], "way").items():
        accuracy, loss = (np.array([row[name] for row in own]) for name in ("accuracy", "loss"))
        chosen = ", ".join(row["chosen"] for row in own) if own[0]["chosen"] != "-" else "-"
        body.append([way, spread(100 * accuracy, 2), spread(loss, 4), chosen])
    return ["way", "test accuracy, %", "test loss, nats", "chosen by validation, seed by seed"], body


def _alpha_table(results: Mapping[str, Any]) -> TableCells:
    """Returns the mean coefficients of each way that blends the checkpoints. The oldest checkpoint comes first."""
    body = []
    for way, own in grouped((row for row in results["rows"] if row["alpha"] is not None), "way").items():
        mean = np.mean([row["alpha"] for row in own], axis=0)
        body.append([way, *(f"{value:.2f}" for value in mean)])
    config = results["config"]
    first = config["expert_epochs"] - config["num_experts"] + 1
    return ["epoch", *(str(first + at) for at in range(config["num_experts"]))], body


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `main`."""
    config = results["config"]
    accounts = [
        ["the network", config["network"]],
        ["images it is trained on", f"{config['expert_examples']:,}"],
        ["held-out images for the coefficients", f"{config['target_examples']:,}"],
        ["validation images", f"{config['validation_examples']:,}"],
        ["epochs", str(config["expert_epochs"])],
        ["the last epoch's training loss, nats", spread(np.array([loss[-1] for loss in results["training_loss"]]), 3)],
        ["the checkpoints' distance", spread(100 * np.array(results["distances"]), 1) + " %"],
    ]
    markdown = page(
        results,
        f"One network is trained for each seed on {results['data']}, at a constant learning rate. The last "
        f"{config['num_experts']} epochs each leave a checkpoint. The table has the mean over seeds ± the standard "
        "deviation.",
        markdown_table(*table(results)),
        "The validation images choose by the lowest loss: the checkpoint, k, the decay of the moving average (of "
        f"{', '.join(map(str, results['decays']))} a step), or the step of learning. Every blend has new BatchNorm "
        "statistics from training images, and so has a *refreshed* model. Learned coefficients are found by "
        "Gauss-Newton with BatchNorm by the minibatch. *Free* is without a softmax. Only the learned coefficients "
        "without *on training images* have seen the held-out images.",
        markdown_table(["of a run", "value"], accounts),
        "The distance is that of the checkpoints' parameters from their mean, over the mean's length, a root mean "
        "square.",
        "The coefficients of the checkpoints, means over seeds:",
        markdown_table(*_alpha_table(results)),
    )
    return Report(markdown, {}, {results["title"]: table(results)})


main = frame.study(
    Arguments,
    measure,
    present,
    title="The last checkpoints of one training run",
    rows="rows",
    plan=lambda context, _: f"training runs: {len(context.config.seeds)}",
)

if __name__ == "__main__":
    with process():
        main()
