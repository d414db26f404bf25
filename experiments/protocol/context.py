"""What the stages of a run share: splits, data on the device, network, trainers."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from experiments import models
from experiments.models.network import Variables
from experiments.protocol.config import Config, ExpertFields, part
from experiments.protocol.data import Dataset, Examples, channel_statistics
from experiments.protocol.splits import Indices, Splits, class_counts, draw_splits, draw_target
from experiments.protocol.training import Problem, Trainer, make_evaluate, make_trainer
from experiments.runtime.devices import make_mesh, put
from experiments.runtime.progress import ProgressBars
from experiments.runtime.sources import digest, name_of
from experiments.runtime.stages import Stages
from glue_jax.batches import on_cpu

# It is part of the fingerprint of every stage. It stays as it is, so that kept stages are found.
_FINGERPRINT_VERSION = "0.1.0"
# The function that makes a context, and the parts of a context that no expert depends on.
_PREPARE = "experiments.protocol.context:prepare"
_NOT_OF_EXPERTS = ("experiments.protocol.training:make_evaluate", "experiments.protocol.splits:draw_target")


class Context(NamedTuple):
    """What the stages share.

    Attributes:
        config: every number of the protocol.
        dataset: the data set, in the memory of the host.
        splits: the rows of the validation images, of each expert's images, and of the rest, in the training split.
        targets: the rows of the target images, by seed.
        train: the training split, on the device.
        test: the images that models are reported on, on the device.
        validation: the validation images, on the device.
        problem: the network with the preparation of its images.
        training: the trainer of the experts.
        tuning: the trainer that fine-tunes the blends.
        evaluate: `evaluate(variables, examples) -> {"loss", "accuracy"}`.
        stages: the results that are kept on disk.
        progress: what is shown meanwhile.
    """

    config: Config
    dataset: Dataset
    splits: Splits
    targets: dict[int, Indices]
    train: Examples
    test: Examples
    validation: Examples
    problem: Problem
    training: Trainer
    tuning: Trainer
    evaluate: Callable[[Variables, Examples], dict[str, float]]
    stages: Stages
    progress: ProgressBars

    def images(self, rows: Indices) -> Examples:
        """Some images of the training split, on the device."""
        return take(self.train, rows)

    def target(self, seed: int) -> Examples:
        """The target images of a seed, on the device."""
        return self.images(self.targets[seed])

    @property
    def trained_together(self) -> int:
        """How many experts are trained at once: all on an accelerator, one on a CPU."""
        return 1 if on_cpu(self.train) else self.config.num_experts

    @property
    def expert_fields(self) -> dict[str, Any]:
        """What an expert depends on, apart from its number."""
        fields = {**part(self.config, ExpertFields), "network_options": self.config.network_options}
        # When experts are trained together, an expert's last bits depend on how many are trained at once.
        fields["num_experts"] = self.trained_together
        fields |= {"data": self.dataset.name, "checksum": self.dataset.checksum, "version": _FINGERPRINT_VERSION}
        return {**fields, "code": self._code(leaving_out=_NOT_OF_EXPERTS)}

    @property
    def bank_fields(self) -> dict[str, Any]:
        """What all experts depend on."""
        return {**self.expert_fields, "experts": self.config.num_experts}

    def code(self, *functions: Callable[..., Any]) -> str:
        """Returns the digest of the source of this context, of its experts, and of what functions compute with them."""
        return self._code(*map(name_of, functions))

    def _code(self, *names: str, leaving_out: tuple[str, ...] = ()) -> str:
        """A digest of the source and of the one network, with the number of classes and the shape of the images."""
        network = name_of(models.MODULES[self.config.network])
        begin = _PREPARE, "experiments.protocol.expert_training:_train_experts", network
        found = digest(*begin, *names, leaving_out=(*leaving_out, "experiments.models:MODULES"))
        shape = "x".join(map(str, self.dataset.train.images.shape[1:]))
        return f"{found}, {self.dataset.num_classes} classes of {shape}"


def prepare(
    config: Config, dataset: Dataset, folder: Path, progress: ProgressBars, *, accept_stages: Collection[str] = ()
) -> Context:
    """Draws the splits and builds the network. Refuses a config that does not fit the data.

    Args:
        config: every number of the protocol.
        dataset: the data set of the config, in memory.
        folder: the folder that keeps the stages.
        progress: what is shown meanwhile.
        accept_stages: kinds of stages that are taken even if other source computed them. See `Stages`.

    Raises:
        ValueError: if the config asks for more images than there are, or for larger minibatches.
    """
    splits = draw_splits(
        dataset.train.labels,
        seed=config.expert_seed,
        num_validation=config.validation_examples,
        num_experts=config.num_experts,
        num_examples=config.expert_examples,
        concentration=config.concentration,
    )
    targets = {seed: draw_target(splits.rest, seed=seed, num_target=config.target_examples) for seed in config.seeds}
    for field, batch_size, count in (
        ("expert_batch_size", config.expert_batch_size, config.expert_examples),
        ("alpha_batch_size", config.alpha_batch_size, len(targets[config.seeds[0]])),
        ("fine_tuning_batch_size", config.fine_tuning_batch_size, len(targets[config.seeds[0]])),
    ):
        if batch_size > count:
            raise ValueError(f"{field} is {batch_size}, but there are {count} images to draw from")
    if config.test_examples is not None and config.test_examples > len(dataset.test.labels):
        raise ValueError(f"test_examples is {config.test_examples}, but the test split has {len(dataset.test.labels)}")
    network = models.build(
        config.network,
        image_shape=dataset.train.images.shape[1:],
        num_classes=dataset.num_classes,
        **config.network_options,
    )
    mesh = make_mesh()
    problem = Problem(network, *channel_statistics(dataset.train.images), mesh)
    trained_as = config.expert_learning_rate, config.expert_batch_size
    tuned_as = config.fine_tuning_learning_rate, config.fine_tuning_batch_size
    training = adam_trainer(problem, config, *trained_as)
    train_split = put(dataset.train, mesh)
    return Context(
        config=config,
        dataset=dataset,
        splits=splits,
        targets=targets,
        train=train_split,
        test=put(jax.tree.map(lambda array: array[: config.test_examples], dataset.test), mesh),
        validation=take(train_split, splits.validation),
        problem=problem,
        training=training,
        # With the same numbers it is the same program. It is compiled once if the shapes agree, as they do on a CPU.
        tuning=training if tuned_as == trained_as else adam_trainer(problem, config, *tuned_as),
        evaluate=make_evaluate(problem),
        stages=Stages(folder, accept_stages, progress.say),
        progress=progress,
    )


def adam_trainer(problem: Problem, config: Config, learning_rate: float, batch_size: int) -> Trainer:
    """Returns a trainer with the config's moments of Adam and augmentation."""
    adam = optax.adam(learning_rate, b1=config.expert_b1, b2=config.expert_b2)
    return make_trainer(problem, adam, batch_size=batch_size, augmentation=config.augmentation)


def counts(context: Context) -> dict[str, Any]:
    """Returns what was drawn: the data set, and the number of images of each class."""
    labels, num_classes = context.dataset.train.labels, context.dataset.num_classes
    drawn = {
        "validation": context.splits.validation,
        **{f"expert {index}": rows for index, rows in enumerate(context.splits.experts)},
        **{f"target, seed {seed}": rows for seed, rows in context.targets.items()},
    }
    return {
        "name": context.dataset.name,
        "description": context.dataset.description,
        "checksum": context.dataset.checksum,
        "train": len(labels),
        "test": len(context.test.labels),
        "validation": len(context.splits.validation),
        "target": len(context.targets[context.config.seeds[0]]),
        "drawn by class": {name: class_counts(labels[rows], num_classes) for name, rows in drawn.items()},
    }


def take(examples: Examples, rows: Indices) -> Examples:
    """Returns some examples, by their rows `[n]`."""
    return jax.tree.map(lambda array: array[rows], examples)
