"""A run of the protocol that takes seconds, and checks of what it leaves."""

import contextlib
import copy
import dataclasses
import io
import json

import pytest
from rich.console import Console

from experiments.models import mobilenet, permutations
from experiments.protocol import run as protocol
from experiments.protocol.config import Config
from experiments.protocol.context import prepare
from experiments.runtime.progress import ProgressBars
from experiments.runtime.stages import Stages

TINY = Config(
    dataset="digits",
    network="convnet",
    num_experts=2,
    expert_examples=24,
    expert_epochs=2,
    expert_batch_size=8,
    augmentation="none",
    validation_examples=20,
    target_examples=64,
    alpha_batch_size=16,
    alpha_steps=5,
    validate_every=2,
    patience=3,
    fine_tuning_epochs=2,
    fine_tuning_batch_size=32,
    test_examples=30,
    seeds=(0, 1),
)
ONE_SEED = dataclasses.replace(TINY, seeds=(0,))


@contextlib.contextmanager
def small_mobilenetv2():
    """Makes MobileNetV2 a network of four blocks.

    The first block does not expand. The second expands and adds nothing. The third halves the image. The fourth adds
    its input.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (mobilenet, permutations):
            patch.setattr(module, "STAGES", ((1, 16, 1, 1), (6, 24, 1, 2), (6, 32, 2, 2)))
        yield


def prepare_quietly(config, dataset, folder):
    return prepare(config, dataset, folder, ProgressBars(Console(file=io.StringIO())))


def run_quietly(config, dataset, folder):
    return protocol.run(prepare_quietly(config, dataset, folder))


@contextlib.contextmanager
def killed_after(count):
    """Lets a run keep so many stages, and kills it as it would keep the next: after its work, before its result."""
    write, kept = Stages.write, []

    def write_or_die(self, name, depends_on, result):
        if len(kept) == count:
            raise KeyboardInterrupt
        kept.append(name)
        return write(self, name, depends_on, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "write", write_or_die)
        yield


def without_times(results):
    results = copy.deepcopy(results)
    del results["seconds"]
    for run in results["runs"]:
        del run["prior_seconds"]
    return results


def flip(folder):
    """Changes a byte in the middle of the largest file in a folder."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(bytes(content))


def folder_options(folder):
    """Returns the options of a command that keeps its experts and its results in a folder."""
    return ["--run-dir", str(folder / "run"), "--out-dir", str(folder / "out")]


def check_report(folder, results, *files):
    """Checks what a command wrote into its folder, and returns the text of its report."""
    assert {path.name for path in folder.iterdir()} == {"results.json", "report.md", "stages", *files}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    report = (folder / "report.md").read_text()
    assert "nan" not in report
    return report
