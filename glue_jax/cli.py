"""The command `glue-jax`: look at experts in files, blend them, and learn the coefficients of their blend."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from glue_jax.interrupts import interruptible

# The status of a process that was interrupted, as shells have it.
_INTERRUPTED = 130
_EXPERTS = """each a .safetensors file, a folder of Hugging Face, an orbax checkpoint, a file of PyTorch (.pt, .pth,
.bin, .ckpt), or a folder with a LoRA adapter of PEFT; or the folder of one training run of orbax, with a folder for
each step"""

_EXAMPLES = {
    "inspect": """examples:
  glue-jax inspect a.safetensors b.safetensors c.safetensors
  glue-jax inspect run/ --last 5 --subtree params --picture similarity.png""",
    "blend": """examples:
  glue-jax blend a.pt b.pt c.pt --uniform --out blend
  glue-jax blend model-a/ model-b/ --weights 0.3 0.7 --out blend
  glue-jax blend a2.pt b2.pt c2.pt --weights-from blend/glue.json --out blend2""",
    "learn": """examples:
  glue-jax learn a.pt b.pt c.pt --objective objective.py --out blend

objective.py holds load_data() and one of
  module()                      a PyTorch module; load_data() returns (inputs, labels), or a dict of its arguments
  outputs(params, batch)        the network in JAX, with loss(outputs, batch); a batch is what load_data() returns, with
                                fewer rows
  loss_fn(params, batch)        the loss in JAX
  evaluate(params) -> number    anything, lower is better; load_data() is not needed
It may also hold loss(outputs, batch), metric(outputs, batch) or validation_fn(params, batch) to choose the model by,
load_validation_data(), rename(name), statistics_fn(params, batch) for BatchNorm without a module, and spec(params) to
align experts of separate initialisations.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the words after `glue-jax`. With None they are those of this process.

    Returns:
        The exit status: 0, or 1 after an error, or 130 after Ctrl-C. An error is one line on stderr, and there is no
        result.

    Raises:
        SystemExit: with status 2 if the arguments are wrong, and 0 after `--help`.
    """
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        with interruptible(), warnings.catch_warnings():
            # Warnings of other libraries are not meant for the user of a command. Ours are.
            warnings.simplefilter("ignore")
            warnings.filterwarnings("once", category=UserWarning, module="glue_jax")
            warnings.showwarning = _show_warning
            options.run(options)
    except KeyboardInterrupt:
        print(f"glue-jax: stopped{_advice(options)}", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError) as error:
        # What a user's own function raised says more than what followed from it.
        of_user = [str(error.__cause__)] if type(error.__cause__).__name__ == "ObjectiveError" else []
        text = "; ".join(line.strip() for line in [*str(error).splitlines(), *of_user] if line.strip())
        print(f"glue-jax: error: {text or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _advice(options: argparse.Namespace) -> str:
    """Says how a stopped run continues, if it kept results."""
    from glue_jax.checkpoints import kept_results

    if options.run is not _learn or not kept_results.place(options.out).exists():
        return ""
    return f"; the same command{' without --fresh' if options.fresh else ''} continues from the kept results"


def _show_warning(message: Warning | str, *rest: Any) -> None:
    """Prints a warning as one line."""
    print(f"glue-jax: warning: {message}", file=sys.stderr)


def command() -> None:
    """Runs the command as a process of its own, and ends the process."""
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # The threads of XLA may be in the middle of a program after an interruption.
    (os._exit if status == _INTERRUPTED else sys.exit)(status)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = _Parser(prog="glue-jax", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="inspect | blend | learn")

    def command(name: str, run: Any, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=description,
            description=description,
            epilog=_EXAMPLES[name],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, parser=added)
        added.add_argument("experts", nargs="+", type=_path, metavar="EXPERT", help=_EXPERTS)
        added.add_argument(
            "--subtree", metavar="KEYS", help="the part of each checkpoint that is the model, e.g. params"
        )
        added.add_argument("--steps", nargs="+", type=int, metavar="STEP", help="the steps of a training run")
        added.add_argument("--last", type=int, metavar="N", help="the last N steps of a training run")
        added.add_argument(
            "--take-first",
            nargs="+",
            default=(),
            metavar="PATTERN",
            help="integer tensors that may differ (regular expressions); the first expert's are kept",
        )
        return added

    inspect = command(
        "inspect", _inspect, "Tells whether experts fit together and are related, and who is the outlier."
    )
    inspect.add_argument("--picture", type=_path, metavar="FILE.png", help="draws the cosines; needs matplotlib")
    blend = command("blend", _blend, "Blends experts with given coefficients, one tensor after another.")
    given = blend.add_mutually_exclusive_group(required=True)
    given.add_argument("--weights", nargs="+", type=float, metavar="W", help="one coefficient for each expert")
    given.add_argument("--uniform", action="store_true", help="the average")
    given.add_argument("--weights-from", type=_path, metavar="FILE", help="the glue.json of an earlier blend")
    blend.add_argument("--any-sum", action="store_true", help="accepts coefficients whose sum is not 1")
    learn = command("learn", _learn, "Learns the coefficients on target data, and writes the best model.")
    learn.add_argument(
        "--objective", type=_path, required=True, metavar="FILE.py", help="what the blend is for (see below)"
    )
    learn.add_argument("--base", type=_path, help="the model that LoRA adapters belong to")
    learn.add_argument(
        "--groups",
        choices=("layers", "none"),
        default="layers",
        help="none learns one coefficient for each expert; layers (default) goes on to one for each expert and layer",
    )
    learn.add_argument(
        "--estimator",
        choices=("auto", "gauss-newton", "spsa"),
        default="auto",
        help="auto (default) is gauss-newton if the objective gives the network's outputs, and spsa otherwise",
    )
    learn.add_argument("--seed", type=int, default=0, help="decides minibatches and directions (default: 0)")
    learn.add_argument(
        "--batch-size", type=int, help="the number of examples in a minibatch (default: 64, or all if there are fewer)"
    )
    learn.add_argument(
        "--max-steps",
        type=int,
        default=200,
        help="the largest number of steps of a stage: --groups layers has two stages, otherwise there is one "
        "(default: 200)",
    )
    learn.add_argument(
        "--patience",
        type=int,
        default=10,
        help="a stage ends after this many validations without a new best value (default: 10)",
    )
    learn.add_argument("--fresh", action="store_true", help="begins anew, even if a stopped run could continue")
    for added in (blend, learn):
        added.add_argument("--out", type=_place, required=True, help="a new folder, or a new .safetensors file")
        added.add_argument("--overwrite", action="store_true", help="replaces an earlier result at --out")
    return parser


def _place(word: str) -> Path:
    """Returns the path of a word. It has a name, so that something can be written beside it."""
    path = _path(word)
    return path if path.name not in ("", "..") else path.resolve()


def _path(word: str) -> Path:
    """Returns the path of a word, in which `~` is a home."""
    try:
        return Path(word).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{word} names no user: {error}") from error


def _inspect(options: argparse.Namespace) -> None:
    """Prints how similar the experts are."""
    from glue_jax.checkpoints import inspect_command

    inspect_command.run(options)


def _blend(options: argparse.Namespace) -> None:
    """Blends with given coefficients, and writes the blend with its provenance."""
    from glue_jax.checkpoints import blend_command

    blend_command.run(options)


def _learn(options: argparse.Namespace) -> None:
    """Learns, and writes the best model with its provenance."""
    from glue_jax.checkpoints import learn_command

    learn_command.run(options)
