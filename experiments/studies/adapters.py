"""What learned coefficients are worth for LoRA adapters, on a small transformer in bfloat16.

    python -m experiments.studies.adapters

The base learns scikit-learn's digits in mirror writing. Each of five adapters then learns 200 digits as they are, with
class proportions of its own. The blend should classify all digits. Gauss-Newton in JAX learns its coefficients on 300
target images. PyTorch trains the base and the adapters. PEFT writes the adapters, and reads every blend.

The study takes four minutes on one CPU core. It needs PyTorch and PEFT: pip install torch peft.
"""

import dataclasses
import functools
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import glue_jax
from experiments.models import patch_transformer
from experiments.protocol import data
from experiments.protocol.splits import draw_splits, draw_target
from experiments.reporting.presentation import Report, TableCells, markdown_table, page, reported, spread
from experiments.runtime.progress import ProgressBars
from experiments.runtime.session import exit_on, process
from experiments.runtime.stages import machine
from experiments.studies import frame
from glue_jax.checkpoints import (
    Adapters,
    add_adapter,
    load_adapters,
    merge_adapters,
    open_checkpoints,
    save_adapter,
)
from glue_jax.checkpoints.headers import library
from glue_jax.checkpoints.torch_format import to_numpy
from glue_jax.checks import check_counts

NUM_ADAPTERS, RANK = 5, 4
_TARGETS = ["query", "key", "value", "project", "up", "down", "head"]
_VALIDATION, _TARGET, _EXAMPLES, _CONCENTRATION = 150, 300, 200, 0.5
_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a command line says.

    Attributes:
        out_dir: the folder of the report.
        seeds: the seeds of the draws of images, of the base, of the adapters and of the minibatches.
        base_steps: the steps of Adam that the base takes, with rate 1e-3.
        adapter_steps: the steps of Adam that each adapter takes, with rate 3e-3.
        learning_steps: the largest number of steps of Gauss-Newton.
    """

    out_dir: Path = Path("runs/adapters")
    seeds: tuple[int, ...] = (0, 1, 2)
    base_steps: int = 1000
    adapter_steps: int = 300
    learning_steps: int = 100

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        if not self.seeds:
            raise ValueError("seeds is empty; expected at least one seed")
        check_counts(base_steps=self.base_steps, adapter_steps=self.adapter_steps, learning_steps=self.learning_steps)


def average_apart(paths: Sequence[Path], out: Path) -> Path:
    """Writes an adapter whose factors are averages of the adapters' factors. This is no blend of the adapters."""
    checkpoints = open_checkpoints(paths)
    factors = [checkpoint.read(list(checkpoint.tensors)) for checkpoint in checkpoints]
    shutil.copytree(paths[0], out)
    averages = {
        name: np.mean([each[name].astype(np.float32) for each in factors], axis=0).astype(first.dtype)
        for name, first in factors[0].items()
    }
    library("safetensors.numpy").save_file(averages, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, and writes the report. `arguments` is the command line. None is that of this process.

    Returns:
        The results: `title`, `command`, `machine`, `config`, and `rows`, each with `adapter`, and, by seed, `losses` in
        nats and `accuracies`.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    with exit_on(ValueError):
        parsed = tyro.cli(Arguments, prog="python -m experiments.studies.adapters", description=__doc__, args=words)
    command = frame.command_line("studies.adapters", words)
    with exit_on(ImportError):
        torch, peft = (library(name, "pip install torch peft") for name in ("torch", "peft"))

    def work(progress: ProgressBars) -> dict[str, Any]:
        bar = progress.stage("Adapters", len(parsed.seeds))
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in parsed.seeds:
            for name, measured in measure(parsed, seed).items():
                found.setdefault(name, []).append(measured)
            bar.advance()
        return {
            "title": "Blends of LoRA adapters",
            "command": command,
            "machine": f"{machine()}, PyTorch {torch.__version__}, PEFT {peft.__version__}",
            "config": {**dataclasses.asdict(parsed), "out_dir": str(parsed.out_dir)},
            "rows": [
                {"adapter": name, "losses": [loss for loss, _ in each], "accuracies": [right for _, right in each]}
                for name, each in found.items()
            ],
        }

    return reported(parsed.out_dir, command, work, present)


def measure(parsed: Arguments, seed: int) -> dict[str, tuple[float, float]]:
    """Trains the base and the adapters of one seed, and blends them.

    Returns:
        The loss in nats and the accuracy on the test images, by the name of the adapter.
    """
    dataset = data.load("digits")
    labels = dataset.train.labels
    splits = draw_splits(
        labels,
        seed=seed,
        num_validation=_VALIDATION,
        num_experts=NUM_ADAPTERS,
        num_examples=_EXAMPLES,
        concentration=_CONCENTRATION,
    )
    images = {
        "train": patch_transformer.patches(dataset.train.images),
        "test": patch_transformer.patches(dataset.test.images),
    }
    mirrored = patch_transformer.patches(dataset.train.images[:, :, ::-1])

    def part(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"x": images["train"][indices], "y": labels[indices]}

    validation, test = part(splits.validation), {"x": images["test"], "y": dataset.test.labels}
    base = trained_base({"x": mirrored[splits.rest], "y": labels[splits.rest]}, parsed.base_steps, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = [
            write_adapter(base, part(indices), parsed.adapter_steps, NUM_ADAPTERS * seed + index, folder / str(index))
            for index, indices in enumerate(splits.experts)
        ]
        adapters, uniform = load_adapters(paths), np.full(NUM_ADAPTERS, 1 / NUM_ADAPTERS)
        best = min(paths, key=lambda path: tested(base, path, validation)[0])
        learned = functools.partial(
            learn, base, adapters, part(draw_target(splits.rest, seed=seed, num_target=_TARGET)), validation, seed
        )
        layers = glue_jax.merging.group_by_path(adapters.experts, r"blocks\.\d+|head")
        blends = {
            "none, the base": None,
            "best adapter by validation": best,
            "average of A and average of B": average_apart(paths, folder / "apart"),
            "average of the products": save_adapter(folder / "uniform", adapters, uniform),
            "learned coefficients": save_adapter(
                folder / "learned", adapters, learned(parsed.learning_steps, merge_adapters, None)
            ),
            "learned coefficients by layer": save_adapter(
                folder / "layers",
                adapters,
                learned(
                    parsed.learning_steps,
                    functools.partial(merge_adapters, groups=layers.rows),
                    jnp.tile(uniform, (len(layers.names), 1)),
                ),
                layers.rows,
            ),
        }
        return {name: tested(base, path, test) for name, path in blends.items()}


def learn(
    base: Any,
    adapters: Adapters,
    target: Mapping[str, np.ndarray],
    validation: Mapping[str, np.ndarray],
    seed: int,
    max_steps: int,
    merge_fn: Callable[..., Any],
    beta: jax.Array | None,
) -> jax.Array:
    """Returns free coefficients by Gauss-Newton, `[K]` or by layer. They are learned in float32 from the average on."""
    weights = {name: jnp.asarray(to_numpy(tensor), jnp.float32) for name, tensor in base.state_dict().items()}
    loss_fn = glue_jax.OutputLoss(
        lambda adapter, batch: patch_transformer.outputs(add_adapter(weights, adapter), batch["x"]),
        lambda logits, batch: optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(),
    )
    return glue_jax.learn(
        jax.random.key(seed),
        adapters.experts,
        dict(target),
        loss_fn=loss_fn,
        state=None if beta is None else glue_jax.init(NUM_ADAPTERS, beta=beta, link_fn=glue_jax.unconstrained),
        step_fn=glue_jax.gauss_newton_step,
        link_fn=glue_jax.unconstrained,
        merge_fn=merge_fn,
        validation_data=dict(validation),
        batch_size=_BATCH,
        max_steps=max_steps,
    ).alpha


def trained_base(examples: Mapping[str, np.ndarray], steps: int, seed: int) -> Any:
    """Trains a transformer of PyTorch in float32, and returns it in bfloat16."""
    torch = library("torch")
    torch.manual_seed(seed)
    model = patch_transformer.network(torch)
    _train(torch, model, examples, steps, 1e-3)
    return model.to(torch.bfloat16)


def write_adapter(base: Any, examples: Mapping[str, np.ndarray], steps: int, seed: int, folder: Path) -> Path:
    """Trains an adapter by PEFT, and writes it in bfloat16.

    Returns:
        The folder.
    """
    torch, peft = library("torch"), library("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=_TARGETS)
    model = peft.get_peft_model(_copy(base), config)
    _train(torch, model, examples, steps, 3e-3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def tested(base: Any, adapter: Path | None, examples: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Returns the loss in nats and the accuracy of the base with an adapter, which PEFT reads and applies."""
    torch, peft = library("torch"), library("peft")
    model = _copy(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(examples["x"])).float()
    labels = torch.from_numpy(examples["y"]).long()
    return float(torch.nn.functional.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def _train(torch: Any, model: Any, examples: Mapping[str, np.ndarray], steps: int, rate: float) -> None:
    """Trains the parameters of a model that may be trained, by Adam. Minibatches are drawn with replacement."""
    optimizer = torch.optim.Adam([tensor for tensor in model.parameters() if tensor.requires_grad], lr=rate)
    x, y = torch.from_numpy(examples["x"]), torch.from_numpy(examples["y"]).long()
    for _ in range(steps):
        chosen = torch.randint(len(x), (_BATCH,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[chosen]).float(), y[chosen]).backward()
        optimizer.step()


def _copy(base: Any) -> Any:
    """Returns a copy of a transformer, which PEFT may change."""
    torch = library("torch")
    model = patch_transformer.network(torch).to(torch.bfloat16)
    model.load_state_dict(base.state_dict())
    return model


def present(results: Mapping[str, Any]) -> Report:
    """Returns all that is shown of the results of `main`."""
    table = _table(results)
    return Report(
        page(
            results,
            f"A transformer in bfloat16 reads digits in mirror writing. {NUM_ADAPTERS} LoRA adapters of rank {RANK} "
            f"each learned {_EXAMPLES} digits as they are, with class proportions of their own. The learned "
            f"coefficients are free. Gauss-Newton learned them on {_TARGET} target images. Loss (in nats) and accuracy "
            "are those of PEFT, in bfloat16, on the test images: means and standard deviations of "
            f"{len(results['config']['seeds'])} seeds.",
            markdown_table(*table),
        ),
        {},
        {"Test loss and accuracy": table},
    )


def _table(results: Mapping[str, Any]) -> TableCells:
    """Returns a row for each adapter."""
    return ["adapter", "test loss", "test accuracy, %"], [
        [row["adapter"], spread(np.array(row["losses"]), 3), spread(100 * np.array(row["accuracies"]), 1)]
        for row in results["rows"]
    ]


if __name__ == "__main__":
    with process():
        main()
