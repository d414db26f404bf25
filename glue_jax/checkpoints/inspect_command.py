"""`glue-jax inspect`: whether experts in files fit together, how similar they are, and who is the outlier."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glue_jax.checkpoints.adapters import Adapters
from glue_jax.checkpoints.command_experts import open_experts
from glue_jax.checkpoints.formats import Checkpoint
from glue_jax.checkpoints.headers import library
from glue_jax.checkpoints.inspection import inspect_experts
from glue_jax.merging.similarity import Similarity
from glue_jax.priors.report import are_related, outliers, relations_of

_MOST_LAYERS = 12


def run(options: argparse.Namespace) -> None:
    """Prints how similar the experts are, and draws it if asked."""
    if options.picture:
        _check_picture(options.picture)
    experts, adapters = open_experts(options)
    if adapters:
        if options.picture:
            raise ValueError(f"--picture is {options.picture}, but has no meaning for adapters of PEFT; leave it out")
        print(_adapters(adapters))
        return
    found = inspect_experts(experts, options.take_first)
    print(describe(experts, found))
    if options.picture:
        draw(experts, found, options.picture)
        print(f"written: {options.picture}")


def _check_picture(path: Path) -> None:
    """Refuses a picture that cannot be drawn, before the weights are read."""
    if path.suffix != ".png":
        raise ValueError(f"--picture is {path}; expected the ending .png")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist")
    library("matplotlib", "pip install matplotlib").use("Agg")


def describe(experts: Sequence[Checkpoint], found: Similarity) -> str:
    """Returns the similarity as lines of text: the experts, and the layers in which they differ most."""
    first, relations = experts[0], relations_of(found.cosine[-1])
    apart = outliers(relations)
    dtypes = sorted({np.dtype(tensor.dtype).name for tensor in first.tensors.values()})
    lines = [
        f"{len(experts)} experts fit together: {len(first.tensors)} tensors, {first.num_bytes:,} bytes each, "
        f"{', '.join(dtypes)}",
        "",
        "cosine: the median cosine of an expert's kernels to those of the others",
        "distance: from the mean of all experts, divided by the length of the mean",
        "",
        " cosine  distance  expert",
    ]
    for index, one in enumerate(experts):
        cosine, distance = relations[index].cosine, found.distance[-1][index]
        lines.append(f"{cosine:7.3f}  {distance:8.3f}  {index} {one.path}{'  (outlier)' if index in apart else ''}")
    lines += ["", are_related(relations), "", " lowest cosine  largest distance  layer"]
    order = np.argsort([cosine.min() for cosine in found.cosine[:-1]])
    for row in order[:_MOST_LAYERS]:
        lowest, distance = found.cosine[row].min(), found.distance[row].max()
        lines.append(f"{lowest:14.3f}  {distance:16.3f}  {found.names[row]}")
    if len(order) > _MOST_LAYERS:
        lines.append(f"and {len(order) - _MOST_LAYERS} layers whose experts are closer")
    return "\n".join(lines)


def _adapters(adapters: Adapters) -> str:
    """Returns the adapters as lines of text: their base, and their ranks."""
    lines = [f"{len(adapters.configs)} adapters fit together, of the base {adapters.base}", "", " ranks  adapter"]
    for index, one in enumerate(adapters.checkpoints):
        ranks = sorted({ranks[index] for ranks in adapters.ranks.values()} - {0})
        lines.append(f"{','.join(map(str, ranks)):>6}  {index} {one.path.parent}")
    largest = max(map(sum, adapters.ranks.values()))
    return "\n".join(
        [*lines, "", f"Their blend has at most the rank {largest} in each of {len(adapters.ranks)} modules."]
    )


def draw(experts: Sequence[Checkpoint], found: Similarity, path: Path) -> None:
    """Draws the cosines between the experts, and the lowest cosine of each layer."""
    pyplot = library("matplotlib.pyplot")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = [f"{index} {one.path.name}" for index, one in enumerate(experts)]
    image = left.imshow(found.cosine[-1], vmin=min(0, found.cosine[-1].min()), vmax=1)
    left.set_xticks(range(len(names)), range(len(names)))
    left.set_yticks(range(len(names)), names)
    left.set_title("cosine between experts, all kernels")
    figure.colorbar(image, ax=left)
    lowest = [cosine.min() for cosine in found.cosine[:-1]]
    right.barh(range(len(lowest)), lowest)
    right.set_yticks(range(len(lowest)) if len(lowest) <= 40 else [], found.names[:-1] if len(lowest) <= 40 else [])
    right.invert_yaxis()
    right.set_title("lowest cosine in each layer")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
