"""Experts in files, made by the tests."""

import contextlib
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from glue_jax.checkpoints import open_checkpoint


def weights(seed, dtype: Any = np.float32):
    """A small state dict of PyTorch, with BatchNorm and its counter."""
    random = np.random.default_rng(seed)
    state = {
        "fc1.weight": random.normal(size=(8, 4)),
        "fc1.bias": random.normal(size=8),
        "bn.running_var": random.uniform(0.5, 1.5, size=8),
        "fc2.weight": random.normal(size=(3, 8)),
    }
    counter = {"bn.num_batches_tracked": np.array(100 + seed)}
    return {name: value.astype(dtype) for name, value in state.items()} | counter


def save(folder, k=3, dtype: Any = np.float32, change=lambda seed, state: state):
    """Writes K experts as safetensors files, and returns their paths."""
    paths = [folder / f"expert{seed}.safetensors" for seed in range(k)]
    for seed, path in enumerate(paths):
        save_file(change(seed, weights(seed, dtype)), path, metadata={"format": "pt", "made": "by a test"})
    return paths


def save_shards(folder, seed, dtype: Any = np.float32, *, counter=True):
    """Writes one expert as a folder of Hugging Face, with two files, an index and side files."""
    folder.mkdir(parents=True)
    state = weights(seed, dtype)
    if not counter:
        del state["bn.num_batches_tracked"]
    halves = {"model-00001-of-00002.safetensors": list(state)[:2], "model-00002-of-00002.safetensors": list(state)[2:]}
    for file, names in halves.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in halves.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "a test"}')
    (folder / "training_args.bin").write_bytes(b"no weights")
    return folder


def expected(alpha, dtype: Any = np.float32):
    """The blend by its definition, in float64, and the first expert's counter."""
    states = [weights(seed, dtype) for seed in range(len(alpha))]
    blend = {
        name: sum(a * state[name].astype(np.float64) for a, state in zip(alpha, states, strict=True))
        for name in states[0]
        if jnp.issubdtype(states[0][name].dtype, jnp.floating)
    }
    return blend | {"bn.num_batches_tracked": states[0]["bn.num_batches_tracked"]}


def everything_in(folder):
    """The names and the bytes of all files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def unchanged(folder):
    """Checks that nothing in a folder is written, changed or removed."""
    before = everything_in(folder)
    yield
    assert everything_in(folder) == before


def read(path):
    opened = open_checkpoint(path)
    return opened.read(list(opened.tensors))
