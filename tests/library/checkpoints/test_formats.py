import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from glue_jax.checkpoints import formats, load_experts, open_checkpoint, open_checkpoints, save_blend
from tests.library.checkpoints.helpers import save, save_shards, weights

TREE = {
    "params": {"Dense_0": {"kernel": np.ones((2, 3), jnp.bfloat16), "bias": np.arange(3.0, dtype=np.float32)}},
    "blocks": [{"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}],
    "step": 7,
}


@pytest.fixture
def run(tmp_path):
    with ocp.training.Checkpointer(str(tmp_path / "run")) as checkpointer:
        for step in (5, 10, 100):
            tree = jax.tree.map(lambda leaf, step=step: np.asarray(leaf + step, np.asarray(leaf).dtype), TREE)
            checkpointer.save(step, tree)
    return tmp_path / "run"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.float64])
def test_a_safetensors_file_is_read_in_its_own_dtype(tmp_path, dtype):
    (path,) = save(tmp_path, 1, dtype)
    opened = open_checkpoint(path)
    state = weights(0, dtype)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in opened.tensors.items()} == {
        name: (value.shape, value.dtype) for name, value in state.items()
    }
    read = opened.read(list(opened.tensors))
    assert all(np.array_equal(read[name], state[name]) for name in state)
    assert opened.metadata["made"] == "by a test"


def test_the_index_decides_which_files_belong_to_a_folder(tmp_path):
    folder = save_shards(tmp_path / "model", 0)
    save_file({"other": np.ones(2)}, folder / "consolidated.safetensors")
    opened = open_checkpoint(folder)
    assert opened.tensors.keys() == weights(0).keys()
    assert len(set(opened.files.values())) == 2
    read = opened.read(["fc2.weight", "fc1.weight"])
    assert np.array_equal(read["fc2.weight"], weights(0)["fc2.weight"])


@pytest.mark.parametrize("change", ["missing shard", "no index", "wrong index", "two indices", "a path as a file"])
def test_a_folder_whose_files_do_not_fit_is_refused(tmp_path, change):
    folder = save_shards(tmp_path / "model", 0)
    index = folder / "model.safetensors.index.json"
    made = json.loads(index.read_text())
    if change == "missing shard":
        (folder / "model-00002-of-00002.safetensors").unlink()
        expected, message = FileNotFoundError, r"lacks \['model-00002-of-00002.safetensors'\]"
    elif change == "no index":
        index.unlink()
        expected, message = ValueError, "has 2 files .* and no index"
    elif change == "wrong index":
        made["weight_map"]["unknown.weight"] = "model-00001-of-00002.safetensors"
        index.write_text(json.dumps(made))
        expected, message = ValueError, r"does not fit its files; only one of the two has \['unknown.weight'\]"
    elif change == "two indices":
        (folder / "fp16.safetensors.index.json").write_text(json.dumps(made))
        expected, message = ValueError, "has 2 indices"
    else:
        made["weight_map"]["fc1.weight"] = "../secret.safetensors"
        index.write_text(json.dumps(made))
        expected, message = ValueError, "is no index of Hugging Face"
    with pytest.raises(expected, match=message):
        open_checkpoint(folder)


def test_a_leaf_of_an_orbax_checkpoint_has_its_path_as_its_name(run):
    opened = open_checkpoint(run / "10", subtree="blocks")
    assert list(opened.tensors) == ["0/w", "1/w"]
    assert opened.read(["1/w"])["1/w"].tolist() == [11, 11]
    params = open_checkpoint(run / "5", subtree="params/Dense_0")
    assert params.tensors["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, [5, 10, 100]), ({"last": 2}, [10, 100]), ({"steps": [100, 5]}, [100, 5]), ({"last": 1}, [100])],
)
def test_the_steps_of_a_run_come_in_order_of_their_numbers(run, options, steps):
    opened = open_checkpoints(run, subtree="params", **options)
    assert [int(one.path.name) for one in opened] == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 4}, "last is 4; expected 1 to 3"),
        ({"last": 0}, "last is 0; expected 1 to 3"),
        ({"steps": [7]}, r"has no step 7; it has \[5, 10, 100\]"),
        ({"steps": [5], "last": 1}, "steps and last were both given"),
    ],
)
def test_steps_that_a_run_does_not_have_are_refused(run, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoints(run, subtree="params", **options)


def test_a_run_is_no_checkpoint_and_a_number_is_no_weight(run):
    with pytest.raises(ValueError, match=r"is a run with the steps \[5, 10, 100\]; expected the folder of one step"):
        open_checkpoint(run)
    with pytest.raises(ValueError, match="subtree is 'parms', but there is no 'parms'; the keys there are"):
        open_checkpoint(run / "5", subtree="parms")


def test_one_of_several_trees_is_named_by_subtree(tmp_path):
    trees = {"params": {"w": np.ones(2, np.float32)}, "opt_state": {"w": np.zeros(2, np.float32)}}
    ocp.save_checkpointables(str(tmp_path / "several"), trees)
    with pytest.raises(ValueError, match=r"it holds the trees \['opt_state', 'params'\], and subtree is None"):
        open_checkpoint(tmp_path / "several")
    assert open_checkpoint(tmp_path / "several", subtree="params").read(["w"])["w"].tolist() == [1, 1]
    assert open_checkpoint(tmp_path / "several", subtree="opt_state").read(["w"])["w"].tolist() == [0, 0]


def test_an_older_checkpoint_of_orbax_is_read_from_a_path_with_brackets(tmp_path):
    import orbax.checkpoint as older

    older.PyTreeCheckpointer().save(tmp_path / "a", {"b": {"w": np.ones(2, np.float32)}})
    (tmp_path / "a").rename(tmp_path / "a[1]")
    assert open_checkpoint(tmp_path / "a[1]").read(["b/w"])["b/w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.safetensors", None, "does not exist"),
        ("no.txt", b"text", "has the ending '.txt'; expected .safetensors"),
        ("short.safetensors", b"\x10", "is no readable checkpoint"),
        ("random.safetensors", bytes(range(200)), "is no readable checkpoint"),
        ("empty.safetensors", b"\x02\0\0\0\0\0\0\0{}", "holds no tensors"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoint(tmp_path / name)


def test_a_truncated_file_is_refused_before_its_weights_are_read(tmp_path):
    (path,) = save(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"expert0.safetensors is no readable checkpoint: SafetensorError"):
        open_checkpoint(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no weights that are known"):
        open_checkpoint(tmp_path)


def test_portions_hold_all_names_once_and_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_PORTION_BYTES", 200)
    opened = open_checkpoint(save(tmp_path, 1)[0])
    portions = list(opened.portions())
    assert sorted(name for portion in portions for name in portion) == sorted(opened.tensors)
    assert len(portions) > 1


def test_the_hash_is_that_of_the_file(tmp_path):
    import hashlib

    (path,) = save(tmp_path, 1)
    assert open_checkpoint(path).sha256() == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


class TestTorch:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'glue_jax[foreign]'")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_state_dict_is_read_in_its_own_dtype(self, tmp_path, zipped):
        state = {"w": self.torch.arange(6, dtype=self.torch.bfloat16).reshape(2, 3), "n": self.torch.tensor(3)}
        self.torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        read = open_checkpoint(tmp_path / "a.pt").read(["w", "n"])
        assert read["w"].dtype == jnp.bfloat16
        assert read["w"].astype(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert read["n"] == 3

    @pytest.mark.parametrize("zipped", [(True, False), (False, True)])
    def test_a_file_of_the_old_format_is_loaded_once(self, tmp_path, monkeypatch, zipped):
        paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
        for path, new in zip(paths, zipped, strict=True):
            state = {name: self.torch.ones(4) for name in "vwx"}
            self.torch.save(state, path, _use_new_zipfile_serialization=new)
        checkpoints = [open_checkpoint(path) for path in paths]
        monkeypatch.setattr(formats, "_PORTION_BYTES", 16)
        loaded, load = [], self.torch.load
        monkeypatch.setattr(self.torch, "load", lambda file, **words: loaded.append(file) or load(file, **words))
        assert load_experts(checkpoints)["x"].shape == (2, 4)
        assert loaded == paths

    @pytest.mark.parametrize("name", ["a.pt", "lightning.ckpt"])
    def test_the_model_in_a_larger_file_is_named_by_subtree(self, tmp_path, name):
        path = tmp_path / name
        self.torch.save({"state_dict": {"model.w": self.torch.ones(2)}, "epoch": 3, "hyper_parameters": {"k": 1}}, path)
        with pytest.raises(ValueError, match=r"If the model is one of .*'state_dict'\], pass this name as subtree"):
            open_checkpoint(path)
        experts = load_experts([path, path], subtree="state_dict", rename=lambda name: name.removeprefix("model."))
        assert {name: leaf.shape for name, leaf in experts.items()} == {"w": (2, 2)}
        like = open_checkpoint(path, subtree="state_dict")
        saved = save_blend(tmp_path / "out", {"model.w": jnp.zeros(2)}, like=like)
        assert list(open_checkpoint(saved).tensors) == ["model.w"]

    def test_code_in_a_pickle_does_not_run(self, tmp_path):
        ran = tmp_path / "ran"
        self.torch.save({"w": _Touch(str(ran))}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="may hold code, which is not run"):
            open_checkpoint(tmp_path / "a.pt")
        assert not ran.exists()

    def test_tensors_that_numpy_does_not_know_are_refused(self, tmp_path):
        self.torch.save({"w": self.torch.ones(2).to_sparse()}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="w is a sparse or quantized tensor"):
            open_checkpoint(tmp_path / "a.pt")


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
