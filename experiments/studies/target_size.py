"""When does blending pay? Test accuracy by the number of labelled target images, from each of several starts.

    python -m experiments.studies.target_size
    python -m experiments.studies.target_size --experiment cifar10 --sizes 30 100 300 1000

Each start is measured as it is (the prior), and after fine-tuning. A user has n labelled images of the target, and
nothing else. A fifth of the n images, at least 10 and at most 1000, is the validation set. The validation images choose
the coefficients that are kept and the number of epochs of fine-tuning, which may be none. The other images are for
learning. The experiment's own validation images are not used. A smaller target set is part of a larger one of the same
seed. If nothing is learned, all n images are used. They choose the most accurate expert, and at most 2048 of them give
BatchNorm's statistics.

Fine-tuning has the experiment's own optimizer, learning rate and minibatches. If there are fewer images than a
minibatch holds, it takes all images. It takes at most `--epochs` epochs. If these have fewer than `--least-steps`
steps, it takes more epochs. It ends if a quarter of the epochs brought no lower validation loss. The model with the
lowest validation loss is kept. The accuracy does not choose the model, because with few images many epochs have the
same accuracy, and the first of them is too early. Training from scratch is the same from fresh weights.

The result of each size, start and seed is kept, so a stopped run continues, and sizes can be added.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.config import CoefficientFields, FineTuningFields, part
from experiments.protocol.context import Context, adam_trainer
from experiments.protocol.expert_training import train_experts
from experiments.protocol.presets import ExpertArguments
from experiments.protocol.training import Trainer, train
from experiments.reporting.presentation import STYLE, Report, TableCells, grouped, markdown_table, page, spread
from experiments.runtime.session import exit_on, process
from experiments.runtime.stages import Stages
from experiments.studies import frame
from experiments.studies.frame import slug
from experiments.studies.sharing import coefficients
from experiments.studies.starts import LEAST_VALIDATION, SCRATCH, STARTS, Bank, Labelled, labelled_images, make_bank
from glue_jax.checks import check_counts

# Fine-tuning ends if this part of the largest number of epochs brought no lower validation loss.
_PATIENCE = 4
# A seed's key is folded with this number. The protocol has other numbers.
_TUNING = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(ExpertArguments):
    """What a command line says.

    Attributes:
        sizes: numbers of labelled target images. Sizes that the data cannot give are left out. `target-examples` has
            no effect.
        starts: the starts whose names contain one of these words. The default is all starts.
        epochs: the largest number of epochs of fine-tuning. The experiment's own `fine-tuning-epochs` has no effect.
        least_steps: if `epochs` epochs have fewer steps than this, more epochs are allowed.
    """

    sizes: tuple[int, ...] = (30, 100, 300, 1000, 3000, 10_000)
    starts: tuple[str, ...] = ()
    epochs: int = 40
    least_steps: int = 500

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        check_counts(epochs=self.epochs, least_steps=self.least_steps)
        least = 2 * LEAST_VALIDATION
        if not self.sizes or len(set(self.sizes)) < len(self.sizes) or min(self.sizes) < least:
            raise ValueError(f"sizes are {self.sizes}; expected at least one, each at least {least} and given once")
        frame.chosen("starts", self.starts, STARTS)


def measure(context: Context, parsed: Arguments, stages: Stages) -> dict[str, Any]:
    """Measures what is not measured yet.

    Returns:
        A dict. `data` is the name of the data set. `available` is the number of images from which target images are
        drawn. `left_out` has the sizes above that. `rows` has a row for each size, start and seed, with `size`,
        `start`, `seed`, `validation` (the number of images that chose), `prior_accuracy`, `prior_loss`,
        `tuned_accuracy` and `tuned_loss` on the test images (fractions and nats), `epochs` (the number that was
        chosen), `most_epochs`, `validation_loss` by epoch, `prior_seconds`, `seconds` (all of them, compilation
        included) and `machine`.

    Raises:
        SystemExit: if the data can give none of the sizes.
    """
    config, available = context.config, len(context.splits.rest)
    sizes = sorted(size for size in parsed.sizes if size <= available)
    with exit_on(ValueError):
        if not sizes:
            raise ValueError(f"sizes are {parsed.sizes}, but there are {available} images to draw from")
    experts = glue_jax.stack_experts(train_experts(context)[0])
    bank = make_bank(context, experts)
    trainer = functools.cache(functools.partial(_trainer, context))
    fields = {**context.bank_fields, **part(config, CoefficientFields, FineTuningFields)}
    fields |= {"epochs": parsed.epochs, "least_steps": parsed.least_steps}
    fields["code"] = context.code(_measure, labelled_images, _trainer, make_bank, coefficients)
    starts = frame.chosen("starts", parsed.starts, STARTS)
    bar = context.progress.stage("Sizes, starts, seeds", len(sizes) * len(starts) * len(config.seeds))
    rows = []
    for size in sizes:
        for start in starts:
            for seed in config.seeds:
                labelled = labelled_images(context, seed, size)
                compute = functools.partial(_measure, bank, start, labelled, trainer, parsed)
                depends_on = {**fields, "size": size, "start": start, "seed": seed}
                row = stages.run(f"target-size/{slug(start)}-n{size}-seed{seed}", depends_on, compute)
                rows.append({"size": size, "start": start, "seed": seed, **row})
                bar.advance()
            last = rows[-len(config.seeds) :]
            prior, tuned = (100 * np.mean([row[f"{of}_accuracy"] for row in last]) for of in ("prior", "tuned"))
            context.progress.say(f"{size} images, {start}: test accuracy {prior:.1f} %, fine-tuned {tuned:.1f} %")
    left_out = sorted(set(parsed.sizes) - set(sizes))
    return {"data": context.dataset.name, "available": available, "left_out": left_out, "rows": rows}


def _measure(
    bank: Bank, start: str, labelled: Labelled, trainer: Callable[[int], Trainer], parsed: Arguments
) -> dict[str, Any]:
    """Returns the results of the prior and of the fine-tuned model on the test images."""
    context, begin = bank.context, time.perf_counter()
    prior = jax.block_until_ready(STARTS[start](bank, labelled))
    prior_seconds = time.perf_counter() - begin
    batch_size = min(context.config.fine_tuning_batch_size, len(labelled.learning))
    steps_per_epoch = len(labelled.learning) // batch_size
    most_epochs = max(parsed.epochs, -(-parsed.least_steps // steps_per_epoch))
    tuned, losses = fine_tune(context, trainer(batch_size), prior, labelled, most_epochs)
    found = {}
    for name, variables in (("prior", prior), ("tuned", tuned)):
        found |= {f"{name}_{what}": value for what, value in context.evaluate(variables, context.test).items()}
    return {
        **found,
        "validation": len(labelled.validation),
        "epochs": int(np.argmin(losses)),
        "most_epochs": most_epochs,
        "validation_loss": losses,
        "prior_seconds": prior_seconds,
    }


def _trainer(context: Context, batch_size: int) -> Trainer:
    """Returns the trainer of the experiment's fine-tuning, with minibatches of this size."""
    config = context.config
    if batch_size == config.fine_tuning_batch_size:
        return context.tuning
    return adam_trainer(context.problem, config, config.fine_tuning_learning_rate, batch_size)


def fine_tune(
    context: Context, trainer: Trainer, prior: Variables, labelled: Labelled, most_epochs: int
) -> tuple[Variables, list[float]]:
    """Fine-tunes until validation stops improving.

    Args:
        context: what `experiments.protocol.context.prepare` returned.
        trainer: the trainer. Its minibatches hold at most as many images as there are to learn from.
        prior: the model to begin with.
        labelled: the images to learn from, and those that choose.
        most_epochs: the largest number of epochs.

    Returns:
        The model with the lowest validation loss, which may be the prior; and the validation loss by epoch, beginning
        with the prior's.

    Raises:
        FloatingPointError: if a training loss is infinite or NaN; the error has the epoch and the step.
    """
    key = jax.random.fold_in(jax.random.key(labelled.seed), _TUNING)
    validation, rows = context.images(labelled.validation), jnp.asarray(labelled.learning)
    best, losses = prior, [context.evaluate(prior, validation)["loss"]]
    start = jax.tree.map(lambda leaf: leaf[None], prior)
    epochs = train(trainer, key[None], start, context.train, rows[None], num_epochs=most_epochs)
    for epoch, (state, _) in enumerate(epochs):
        variables = jax.tree.map(lambda leaf: leaf[0], state.variables)
        losses.append(context.evaluate(variables, validation)["loss"])
        chosen = int(np.argmin(losses))
        if chosen == epoch + 1:
            best = variables
        if epoch + 1 - chosen >= most_epochs / _PATIENCE:
            break
    return best, losses


def table(results: Mapping[str, Any]) -> TableCells:
    """Returns a row for each start, with the prior's and the fine-tuned model's test accuracy of each size."""
    sizes, body = list(grouped(results["rows"], "size")), []
    for start, rows in grouped(results["rows"], "start").items():
        by_size = grouped(rows, "size")
        cells = [start]
        for size in sizes:
            prior, tuned = (
                100 * np.array([row[f"{of}_accuracy"] for row in by_size[size]]) for of in ("prior", "tuned")
            )
            cells.append(f"{prior.mean():.1f} / {spread(tuned, 1)}")
        body.append(cells)
    return ["prior / fine-tuned, %", *(f"n = {size:,}" for size in sizes)], body


def _size_table(results: Mapping[str, Any]) -> TableCells:
    """Returns how many images validate, and how fine-tuning ended, with a row for each size."""
    body = []
    for size, own in grouped(results["rows"], "size").items():
        none, most = (sum(row["epochs"] == at for row in own) for at in (0, own[0]["most_epochs"]))
        body.append([str(value) for value in (size, own[0]["validation"], len(own), none, most)])
    return ["n", "validation images", "fine-tunings", "chose no epoch", "chose the last epoch"], body


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `main`."""
    left_out = ", ".join(f"{size:,}" for size in results["left_out"]) or "-"
    markdown = page(
        results,
        "The table has the test accuracy of the prior (the model before fine-tuning) / after fine-tuning, in percent, "
        "by the number n of labelled target images: means over seeds. ± is the standard deviation of the fine-tuned "
        "accuracy.",
        "![test accuracy by the number of labelled target images](target-size.png)",
        markdown_table(*table(results)),
        "Only the n images are labelled. Some of them validate: they choose the coefficients that are kept and the "
        "number of epochs, by the lowest loss. The others are learned from. No epoch at all may be chosen. Training "
        "from scratch then stays at fresh weights. All n images choose the best expert. Where a start is refreshed, as "
        "after Gauss-Newton, all n images (at most 2,048) give BatchNorm's statistics.",
        markdown_table(*_size_table(results)),
        "The experts were trained on images of the same kind, so some target images are theirs too.",
        markdown_table(
            ["data", "images to draw from", "sizes left out"],
            [[results["data"], f"{results['available']:,}", left_out]],
        ),
    )
    return Report(markdown, {"target-size.png": _figure(results)}, {results["title"]: table(results)})


def _figure(results: Mapping[str, Any]) -> Figure:
    """Test accuracy by the number of images, the mean over seeds: of the prior dashed, fine-tuned solid."""
    sizes = list(grouped(results["rows"], "size"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.subplots()
        for index, (start, rows) in enumerate(grouped(results["rows"], "start").items()):
            for of, line in (("prior", "--"), ("tuned", "-")):
                # Fresh weights are no prior.
                if start == SCRATCH and of == "prior":
                    continue
                by_size = grouped(rows, "size")
                accuracies = [[row[f"{of}_accuracy"] for row in by_size[size]] for size in sizes]
                mean = 100 * np.mean(accuracies, axis=1)
                label = start if of == "tuned" else None
                axes.plot(sizes, mean, line, marker=".", color=f"C{index}", label=label)
        axes.set(
            xscale="log",
            xlabel="labelled target images, validation included",
            ylabel="test accuracy, % (dashed: before fine-tuning)",
        )
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=3)
    return figure


main = frame.study(
    Arguments, measure, present, title="Test accuracy by the number of labelled target images", rows="rows"
)

if __name__ == "__main__":
    with process():
        main()
