"""`open_checkpoint`: what a file or a folder holds, read from its headers, whatever its format."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from glue_jax.checkpoints import orbax_format, safetensors_format, torch_format

PathLike: TypeAlias = str | Path
Format: TypeAlias = Literal["safetensors", "orbax", "torch"]

ADAPTER_CONFIG = "adapter_config.json"
"""The file that makes a folder an adapter of PEFT."""

# Tensors are read in portions of about this size, so that a small tensor costs no call of its own.
_PORTION_BYTES = 32 * 2**20
# Git LFS writes such a file in place of a large one.
_POINTER, _MOST_POINTER_BYTES = b"version https://git-lfs", 1024
# The trainer of Hugging Face writes these beside the weights.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One expert in files. Its weights stay in the files until `read` is called.

    There is one exception: PyTorch loads a whole file that PyTorch before 1.6 wrote, only to open it.

    Attributes:
        path: the file or the folder.
        format: the format of the weights. For the folder of an adapter of PEFT it is `safetensors` or `torch`.
        tensors: the shape and the dtype of each tensor, by its name. In an orbax checkpoint the name is the path of the
            leaf, joined by slashes.
        files: the file that holds each tensor, by its name. For orbax it is the folder.
        metadata: the texts in the header of a safetensors file.
        structure: the tree of the leaves' names. For safetensors and PyTorch it is a flat dict.
        index: the index of a folder of Hugging Face with several files. None if there is none.
        reader: `reader(names)` returns these tensors as NumPy arrays.
    """

    path: Path
    format: Format
    tensors: Mapping[str, jax.ShapeDtypeStruct]
    files: Mapping[str, Path]
    metadata: Mapping[str, str]
    structure: Any
    index: Path | None
    reader: Callable[[Sequence[str]], dict[str, np.ndarray]] = dataclasses.field(repr=False)

    @property
    def is_mapped(self) -> bool:
        """Whether some tensors can be read without the others. An old file of PyTorch is read whole."""
        return self.format != "torch" or all(map(torch_format.is_mapped, set(self.files.values())))

    @property
    def num_bytes(self) -> int:
        """The size of all tensors, in bytes."""
        return sum(_num_bytes(tensor) for tensor in self.tensors.values())

    def read(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Reads some tensors, as NumPy arrays in the dtypes of the file.

        Raises:
            ValueError: if the file changed, or if it cannot be read; the error names it.
        """
        try:
            arrays = self.reader(names)
        except MemoryError:
            raise
        except Exception as error:
            # Each library has errors of its own for a damaged file.
            raise ValueError(f"{self.path} cannot be read ({_first_line(error)})") from error
        for name in names:
            if (arrays[name].shape, arrays[name].dtype) != (self.tensors[name].shape, self.tensors[name].dtype):
                raise ValueError(f"{self.path} changed while it was read: {name} has another shape or dtype now")
        return arrays

    def portions(self, names: Iterable[str] | None = None) -> Iterator[list[str]]:
        """Yields names of tensors, all by default, in portions that are small enough to be read at once."""
        portion: list[str] = []
        size = 0
        for name in self.tensors if names is None else names:
            if portion and self.is_mapped and size + _num_bytes(self.tensors[name]) > _PORTION_BYTES:
                yield portion
                portion, size = [], 0
            portion.append(name)
            size += _num_bytes(self.tensors[name])
        yield portion

    @property
    def places(self) -> list[Path]:
        """The path, and the files that hold its weights. No result may replace any of them."""
        return list(dict.fromkeys([self.path, *self.files.values()]))

    def sha256(self) -> dict[str, str]:
        """Returns the SHA-256 of each file that holds weights, as 64 hexadecimal digits, by the file's name."""
        found = {}
        for path in dict.fromkeys(self.files.values()):
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    with file.open("rb") as opened:
                        name = file.relative_to(path.parent if path.is_file() else path).as_posix()
                        found[name] = hashlib.file_digest(opened, "sha256").hexdigest()
        return found


def open_checkpoint(path: PathLike, *, subtree: str | None = None) -> Checkpoint:
    """Reads what a file or a folder holds, without its weights.

    Args:
        path: one of

            - a file `.safetensors`;
            - a folder of Hugging Face. Its index, such as `model.safetensors.index.json`, decides which files belong to
              the model. A folder without an index must hold one file `.safetensors`, or one file `.bin` and no
              `.safetensors`;
            - a checkpoint of orbax, or one step of a run of orbax;
            - a file `.pt`, `.pth`, `.bin` or `.ckpt` of PyTorch, which holds a state dict. It is read with
              `weights_only=True`, so that no code in it can run. PyTorch must be installed;
            - a folder with an adapter of PEFT.
        subtree: the part of the checkpoint that is the model, as keys joined by slashes: `"params"` for a checkpoint of
            a whole training state, `"state_dict"` for a file of PyTorch that holds more than a model. With None it is
            all of the checkpoint.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint, if it is damaged, or if it holds something else than arrays of numbers.
        ImportError: if a library for the format is not installed.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a file of weights or a folder")
    kind, files, index = _format_and_files(path)
    for file in files:
        if file.is_file() and file.stat().st_size < _MOST_POINTER_BYTES and file.read_bytes().startswith(_POINTER):
            raise ValueError(f"{file} is a pointer of Git LFS, and has no weights; expected the file: run git lfs pull")
    reader = {"safetensors": safetensors_format, "orbax": orbax_format, "torch": torch_format}[kind]
    try:
        header = reader.read_header(files, subtree)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        # Each library has errors of its own for a damaged file.
        reason = f"{error}" if isinstance(error, ValueError) else _first_line(error)
        raise ValueError(f"{path} is no readable checkpoint: {reason}") from error
    if not header.tensors:
        raise ValueError(f"{path} holds no tensors")
    if index:
        _check_index(index, header.tensors)
    return Checkpoint(path, kind, header.tensors, header.files, header.metadata, header.structure, index, header.reader)


def open_checkpoints(
    paths: PathLike | Sequence[PathLike | Checkpoint],
    *,
    steps: Sequence[int] | None = None,
    last: int | None = None,
    subtree: str | None = None,
) -> list[Checkpoint]:
    """Opens several checkpoints, by their paths or as the steps of one training run.

    Args:
        paths: the paths of the checkpoints, or the folder of one run of orbax with a folder for each step. A checkpoint
            that is open already is taken as it is.
        steps: the steps of the run, if `paths` is the folder of a run. With None they are all of its steps.
        last: how many of the last steps of the run.
        subtree: as for `open_checkpoint`.

    Returns:
        The checkpoints. The steps of a run come in ascending order, or in the order of `steps`.

    Raises:
        FileNotFoundError: if a path or a step does not exist.
        ValueError: if `steps` or `last` is given with several paths, or both are given, or if a checkpoint is damaged.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise ValueError("no checkpoint was given; expected at least one path")
    run = {} if isinstance(given[0], Checkpoint) else steps_of_run(Path(given[0]).expanduser())
    if len(given) > 1 or not run:
        if steps is not None or last is not None:
            raise ValueError(
                "steps and last choose checkpoints of one run, but "
                + (f"{len(given)} paths were given" if len(given) > 1 else f"{given[0]} has no folder for a step")
            )
        return [path if isinstance(path, Checkpoint) else open_checkpoint(path, subtree=subtree) for path in given]
    if steps is not None and last is not None:
        raise ValueError("steps and last were both given; expected one of them")
    if last is not None and not 1 <= last <= len(run):
        raise ValueError(f"last is {last}; expected 1 to {len(run)}, the number of steps in {given[0]}")
    for step in steps or ():
        if step not in run:
            raise FileNotFoundError(f"{given[0]} has no step {step}; it has {sorted(run)}")
    chosen = steps if steps is not None else sorted(run)[-(last or 0) :]
    return [open_checkpoint(run[step], subtree=subtree) for step in chosen]


def steps_of_run(path: Path) -> dict[int, Path]:
    """Returns the folders of a run's steps, by the steps. It is empty if the path is no run of orbax."""
    if not path.is_dir() or orbax_format.is_checkpoint(path):
        return {}
    steps: dict[int, Path] = {}
    for folder in sorted(path.iterdir()):
        step = re.search(r"(\d+)$", folder.name)
        # A save that was not finished is no step.
        if step and ".orbax-checkpoint-tmp" not in folder.name and orbax_format.is_checkpoint(folder):
            if int(step[1]) in steps:
                raise ValueError(f"{path} has {steps[int(step[1])].name} and {folder.name}; expected each step once")
            steps[int(step[1])] = folder
    return steps


def _format_and_files(path: Path) -> tuple[Format, tuple[Path, ...], Path | None]:
    """Returns the format of a path, the files that hold its weights, and their index, if there is one."""
    if path.is_file():
        if path.suffix == ".safetensors":
            return "safetensors", (path,), None
        if path.suffix in torch_format.SUFFIXES:
            return "torch", (path,), None
        endings = ", ".join((".safetensors", *torch_format.SUFFIXES))
        raise ValueError(f"{path} has the ending {path.suffix!r}; expected {endings}, or a folder")
    patterns: tuple[tuple[Format, str], ...] = (("safetensors", "*.safetensors"), ("torch", "*.bin"))
    for kind, pattern in patterns:
        indices = sorted(path.glob(f"{pattern}.index.json"))
        if len(indices) > 1:
            raise ValueError(f"{path} has {len(indices)} indices: {[index.name for index in indices]}; expected one")
        if indices:
            files = sorted({path / name for name in _weight_map(indices[0]).values()})
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{path} lacks {missing}, which its index {indices[0].name} names")
            return kind, tuple(files), indices[0]
    for kind, pattern in patterns:
        files = [file for file in sorted(path.glob(pattern)) if file.name not in _NOT_WEIGHTS]
        if len(files) == 1:
            return kind, tuple(files), None
        if files:
            raise ValueError(
                f"{path} has {len(files)} files {pattern} and no index; expected model{pattern[1:]}.index.json beside "
                "them, or the path of one file"
            )
    if orbax_format.is_checkpoint(path):
        return "orbax", (path,), None
    if run := steps_of_run(path):
        raise ValueError(f"{path} is a run with the steps {sorted(run)}; expected the folder of one step")
    names = sorted(entry.name for entry in path.iterdir())[:5]
    raise ValueError(f"{path} holds no weights that are known; it holds {names}")


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the file of each tensor, from an index of Hugging Face."""
    try:
        found = json.loads(index.read_text())["weight_map"]
        if all(Path(file).name == file for file in found.values()):
            return found
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{index} is no index of Hugging Face; expected JSON with a weight_map of file names")


def _check_index(index: Path, tensors: Mapping[str, Any]) -> None:
    """Refuses an index that names other tensors than its files hold."""
    if differing := sorted(_weight_map(index).keys() ^ tensors.keys()):
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"{index} does not fit its files; only one of the two has {differing[:5]}{more}")


def _num_bytes(tensor: jax.ShapeDtypeStruct) -> int:
    """Returns the size of a tensor in bytes."""
    return tensor.size * np.dtype(tensor.dtype).itemsize


def _first_line(error: BaseException) -> str:
    """Returns the type and the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
