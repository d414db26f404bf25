"""The cost of the steps' programs for a TPU v5e, compiled ahead of time on any machine, without a TPU.

    pip install -e '.[experiments,tpu]'
    python -m experiments.studies.cost.tpu

It writes `tpu.json`, with the peak temporary memory, the FLOPs and the seconds of compilation of two steps. One is the
SPSA step with all probes in one vmapped forward pass. The other is the full-gradient step. Nothing is run.
`python -m experiments.studies.cost` shows these figures too.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding
from rich.console import Console

import glue_jax
from experiments.reporting.presentation import rich_table
from experiments.runtime.arguments import StageArguments
from experiments.runtime.session import process, session
from experiments.runtime.stages import machine, read_json, reading, write_json
from experiments.studies.cost.cost_report import size_table, tpu_blocks
from experiments.studies.cost.programs import (
    Setting,
    compile_program,
    digest_of_row,
    flops,
    full_step,
    make_inputs,
    make_problem,
    spsa_step,
    temporary_bytes,
)
from experiments.studies.frame import command_line

TOPOLOGY = "v5e:2x2"
"""The smallest topology that libtpu describes. The programs are for one of its chips."""
_PLATFORM = "tpu v5e (compiled)"
_FILE = "tpu.json"
# The host of a TPU would tell this to libtpu. Otherwise libtpu asks the network.
_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Otherwise libtpu does not load if another process has loaded it, or was killed with it.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(StageArguments):
    """What a command line says.

    Attributes:
        networks: any of resnet20, mobilenetv2, vit, convnet.
        batch_sizes: the numbers of images in a minibatch.
        num_experts: values of K.
        num_directions: values of m.
        matmul_precision: the precision of the networks' products. The blends always have the highest precision. The
            experiments learn the coefficients with `highest`. That takes longer to compile. For the SPSA step of
            ResNet-20 at batch 64 it takes four times as long. There the temporary memory is the same, and the FLOPs are
            the same within 0.2 %.
    """

    networks: tuple[str, ...] = ("resnet20", "mobilenetv2", "vit")
    batch_sizes: tuple[int, ...] = (64, 512)
    num_experts: int = 10
    num_directions: int = 1
    matmul_precision: Literal["highest", "high", "default"] = "default"
    out_dir: Path = Path("runs") / "cost"

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        if not self.settings():
            raise ValueError("networks or batch_sizes is empty; expected at least one of each")

    def settings(self) -> list[Setting]:
        """Returns the rows."""
        return [
            Setting(
                network=network,
                batch_size=batch_size,
                num_experts=self.num_experts,
                num_directions=self.num_directions,
                matmul_precision=self.matmul_precision,
            )
            for network in dict.fromkeys(self.networks)
            for batch_size in sorted(set(self.batch_sizes))
        ]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles, and writes `tpu.json`. `arguments` is the command line. None is that of this process.

    Returns:
        What `tpu.json` holds: `command`, `topology`, `compiler`, `matmul_precision`, `rows` (see `compile_steps`).
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    parsed = tyro.cli(
        Arguments, prog="python -m experiments.studies.cost.tpu", description=(__doc__ or "").strip(), args=words
    )
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("libtpu, the TPU's compiler, is not installed: pip install -e '.[experiments,tpu]'")
    console, settings, rows = Console(markup=False), parsed.settings(), []
    versions = {"libtpu": importlib.metadata.version("libtpu"), "jax": jax.__version__}
    command = command_line("studies.cost.tpu", words)
    # The folder also has the results of the other command on cost.
    with session(parsed.out_dir, console, "python -m experiments.studies.cost") as progress:
        stages = parsed.stages(progress)
        sharding = _one_chip()
        progress.say(f"{len(settings)} rows of 2 programs for {TOPOLOGY}, minutes each; {machine()}")
        bar = progress.stage("Compilation", len(settings))
        for setting in settings:
            code = digest_of_row(setting, compile_steps)
            depends_on = {**dataclasses.asdict(setting), **versions, "version": glue_jax.__version__, "code": code}
            compute = functools.partial(compile_steps, setting, sharding)
            rows.append(stages.run(f"tpu/{setting.name}", depends_on, compute))
            bar.advance()
        results = {
            "command": command,
            "topology": TOPOLOGY,
            "compiler": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "matmul_precision": parsed.matmul_precision,
            "rows": rows,
        }
        write_json(parsed.out_dir / _FILE, results)
    console.print(rich_table(f"Compiled for {TOPOLOGY}", *size_table(rows)))
    console.print(f"written: {parsed.out_dir / _FILE}", highlight=False, soft_wrap=True)
    return results


def compile_steps(setting: Setting, sharding: Sharding) -> dict[str, Any]:
    """Compiles both steps as a TPU would run them.

    Args:
        setting: the row.
        sharding: the sharding of all arguments. Its device need not exist.

    Returns:
        A row like those of `experiments.studies.cost.step_costs.measure`, without times, with `compile_seconds`.
    """
    problem = make_problem(setting)
    inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(functools.partial(make_inputs, setting, problem)),
    )
    functions = {"full_step": full_step(problem), "spsa_step": spsa_step(problem, setting)}
    programs, seconds = {}, {}
    for name, function in functions.items():
        start = time.perf_counter()
        programs[name] = compile_program(setting, function, inputs)
        seconds[name] = time.perf_counter() - start
    return {
        **dataclasses.asdict(setting),
        "platform": _PLATFORM,
        "temporary_bytes": {name: temporary_bytes(program) for name, program in programs.items()},
        "flops": {"full_step": flops(programs["full_step"]), "spsa_step_vmapped": flops(programs["spsa_step"])},
        "compile_seconds": seconds,
    }


def read(folder: Path) -> dict[str, Any] | None:
    """Returns the content of `tpu.json` in a folder, or None if there is none.

    Raises:
        ValueError: if the file is damaged, or if this module did not write it.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    with reading(path, "run python -m experiments.studies.cost.tpu again"):
        content = read_json(path)
        tpu_blocks(content)
    return content


def _one_chip() -> Sharding:
    """Returns one chip of the topology. This process itself computes on its CPU."""
    os.environ.update(_HOST)
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.get_topology_desc(TOPOLOGY, "tpu", chips_per_host_bounds=[2, 2, 1])
    return SingleDeviceSharding(topology.devices[0])


if __name__ == "__main__":
    with process():
        main()
