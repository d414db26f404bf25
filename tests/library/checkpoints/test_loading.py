import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import glue_jax
from glue_jax.checkpoints import load_experts
from tests.library.checkpoints.helpers import save, save_shards, weights


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_experts_are_stacked_as_stack_experts_stacks_them(tmp_path, dtype):
    loaded = load_experts(save(tmp_path, 3, dtype))
    stacked = glue_jax.stack_experts([weights(seed, dtype) for seed in range(3)], take_first="num_batches_tracked")
    assert jax.tree.structure(loaded) == jax.tree.structure(stacked)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(stacked), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_formats_may_be_mixed(tmp_path):
    paths = [save(tmp_path, 1)[0], save_shards(tmp_path / "model", 1)]
    assert np.array_equal(load_experts(paths)["fc1.bias"][1], weights(1)["fc1.bias"])


def test_an_orbax_run_keeps_its_tree(tmp_path):
    with ocp.training.Checkpointer(str(tmp_path / "run")) as checkpointer:
        for step in (1, 2):
            blocks = [{"w": np.full(2, step, np.float32)}, {"w": np.zeros(2, np.float32)}]
            checkpointer.save(step, {"params": {"blocks": blocks}, "opt": np.zeros(3)})
    loaded = load_experts(tmp_path / "run", subtree="params")
    assert loaded["blocks"][0]["w"].tolist() == [[1, 1], [2, 2]]


def test_rename_gives_nested_dicts(tmp_path):
    loaded = load_experts(save(tmp_path), rename=lambda name: "params/" + name.replace(".", "/"))
    assert loaded["params"]["fc1"]["weight"].shape == (3, 8, 4)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: "same", "rename gives 'same' twice"),
        (lambda name: None, r"rename\('bn.num_batches_tracked'\) returned None; expected a path"),
        (lambda name: "a" if name == "fc1.bias" else f"a/{name}", "rename gives"),
    ],
)
def test_a_wrong_rename_is_refused_before_weights_are_read(tmp_path, rename, message, monkeypatch):
    monkeypatch.setattr("glue_jax.checkpoints.formats.Checkpoint.read", None)
    with pytest.raises(ValueError, match=message):
        load_experts(save(tmp_path), rename=rename)


CHANGES = {
    "name": (lambda state: {**state, "fc3.weight": state["fc2.weight"]}, "fc3.weight is unknown to the first"),
    "missing": (lambda state: {n: v for n, v in state.items() if n != "fc1.bias"}, "fc1.bias is missing"),
    "shape": (
        lambda state: {**state, "fc2.weight": np.ones((100, 8), np.float32)},
        r"fc2.weight has shape \(100, 8\) against \(3, 8\)",
    ),
    "dtype": (
        lambda state: {**state, "fc2.weight": state["fc2.weight"].astype(np.float16)},
        "fc2.weight has dtype float16 against float32",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_experts_that_differ_are_refused_by_their_headers_alone(tmp_path, change, monkeypatch):
    function, message = CHANGES[change]
    paths = save(tmp_path, change=lambda seed, state: function(state) if seed == 2 else state)
    monkeypatch.setattr("glue_jax.checkpoints.formats.Checkpoint.read", None)
    with pytest.raises(ValueError, match=f"expert2.safetensors against .*expert0.safetensors: {message}"):
        load_experts(paths)


def test_a_weight_that_is_not_finite_names_its_file(tmp_path):
    def change(seed, state):
        state["fc1.bias"][3] = np.nan if seed == 1 else 0
        return state

    with pytest.raises(ValueError, match=r"expert1\.safetensors holds nan at fc1.bias; expected finite numbers"):
        load_experts(save(tmp_path, change=change))


def test_integers_that_differ_must_be_named(tmp_path):
    paths = save(tmp_path, change=lambda seed, state: {**state, "positions": np.arange(3) + seed})
    with pytest.raises(ValueError, match=r"expert1\.safetensors has other values at positions"):
        load_experts(paths)
    loaded = load_experts(paths, take_first="positions")
    assert loaded["positions"].tolist() == [[0, 1, 2]] * 3
    assert loaded["bn.num_batches_tracked"].tolist() == [100] * 3


@pytest.mark.parametrize("entry", ["nothing", "fc1"])
def test_take_first_must_match_integers(tmp_path, entry):
    with pytest.raises(ValueError, match=f"take_first has '{entry}', which matches"):
        load_experts(save(tmp_path), take_first=entry)


def test_the_bank_goes_to_its_sharding(tmp_path):
    mesh = jax.make_mesh((1,), ("expert",))
    sharding = NamedSharding(mesh, PartitionSpec("expert"))
    assert load_experts(save(tmp_path), sharding=sharding)["fc1.weight"].sharding == sharding


def test_float64_weights_warn(tmp_path):
    with pytest.warns(UserWarning, match=r"float64 leaves are stored as float32"):
        load_experts(save(tmp_path, change=lambda _, state: state | {"fc1.weight": state["fc1.weight"].astype(float)}))
