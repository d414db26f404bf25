"""Several devices give the results of one."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.runtime import devices
from tests.helpers import ROOT

PROGRAM = """
import dataclasses, io, json, logging, sys, pathlib
import jax, jax.numpy as jnp
from rich.console import Console
from experiments.protocol import data, estimate, run as protocol
from experiments.protocol.context import prepare
from experiments.runtime.progress import ProgressBars
from tests.experiments.helpers import TINY

# An accelerator's way: all experts at once, an epoch or the steps between two validations in one call.
PROTOCOL = "experiments.protocol"
for module in (f"{PROTOCOL}.context", f"{PROTOCOL}.estimate", f"{PROTOCOL}.training", "glue_jax.learning"):
    sys.modules[module].on_cpu = lambda tree: False
# Configs 1 and 2 learn nothing. Their fine-tuning runs the programs of the others' fine-tuning.
protocol.CONFIGS = (3, 4, 5)

# Two steps an epoch: convolutions in a scan are slow on a CPU.
config = dataclasses.replace(
    TINY, seeds=(0,), test_examples=32, alpha_learning_rate=0.1, validation_examples=24,
    expert_examples=16, target_examples=32, fine_tuning_epochs=1, fine_tuning_batch_size=16,
)
context = prepare(config, data.load("digits"), pathlib.Path(sys.argv[1]), ProgressBars(Console(file=io.StringIO())))
compiled = []
handler = logging.Handler()
handler.emit = lambda record: compiled.append(record.getMessage())
logging.getLogger("jax").addHandler(handler)
with jax.log_compiles():
    results = protocol.run(context)
batch = jax.tree.map(lambda array: array[:16], context.train)
variables = context.problem.network.init(jax.random.key(0))
programs = {
    name: jax.jit(jax.grad(function, allow_int=True)).lower(variables, batch).compile().as_text()
    for name, function in {
        "evaluation": context.problem.loss,
        "training": lambda variables, batch: jnp.sum(
            context.problem.network.apply_training(variables, context.problem.normalize(batch.images))[0]
        ),
    }.items()
}
print(json.dumps({
    "devices": jax.device_count(),
    "compiled": sum("Finished XLA compilation of jit(steps)" in message for message in compiled),
    "reductions": {name: program.count("all-reduce(") for name, program in programs.items()},
    "alpha": [run["alpha"] for run in results["runs"]],
    "test_loss": [run["test_loss"] for run in results["runs"]],
    "training_loss": [row["training_loss"] for row in results["experts"]],
    "validation_loss": [row["validation_loss"] for row in results["experts"]],
}))
"""


@pytest.fixture(scope="module")
def on_devices(tmp_path_factory):
    def start(count):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp(f"devices{count}"))],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    running, found = {count: start(count) for count in (1, 8)}, {}
    for count, process in running.items():
        said, errors = process.communicate()
        assert process.returncode == 0, errors
        found[count] = json.loads(said.splitlines()[-1])
    return found


def test_eight_devices_give_the_results_of_one_within_rounding(on_devices):
    one, eight = on_devices[1], on_devices[8]
    assert (one["devices"], eight["devices"]) == (1, 8)
    # Gauss-Newton takes differences of outputs, in which rounding weighs more than in the outputs.
    for field, tolerance in {"alpha": 1e-3, "training_loss": 1e-4, "validation_loss": 1e-4, "test_loss": 1e-3}.items():
        np.testing.assert_allclose(eight[field], one[field], rtol=tolerance)
    assert (np.abs(np.array(one["alpha"])[:, 0] - 0.5) > 0.01).all()


def test_training_compiles_once_for_each_number_of_models(on_devices):
    # All experts at once, and a blend at a time: where the state goes in, it comes out.
    assert on_devices[1]["compiled"] == on_devices[8]["compiled"] == 2


def test_the_minibatch_is_sharded_over_the_devices(on_devices):
    # What is summed over the batch is summed over the devices; with whole copies nothing would have to be.
    assert on_devices[1]["reductions"] == {"evaluation": 0, "training": 0}
    assert min(on_devices[8]["reductions"].values()) > 0


def test_one_device_has_no_mesh_and_shards_nothing():
    assert devices.make_mesh() is None
    x = jax.numpy.ones((4, 2))
    assert devices.shard_batch(x, None) is x


def test_a_batch_that_the_devices_do_not_divide_stays_whole():
    class ThreeDevices:
        size = 3

    x = jax.numpy.ones((4, 2))
    assert devices.shard_batch(x, ThreeDevices()) is x  # pyright: ignore[reportArgumentType]
