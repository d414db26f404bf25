import errno
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

import glue_jax
from glue_jax.checkpoints import blend_files, load_experts, open_checkpoint, open_checkpoints, save_blend, saving, sums
from tests.library.checkpoints.helpers import everything_in, expected, read, save, save_shards, unchanged

ALPHA = [0.5, -0.25, 0.75]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 1e-6), (jnp.bfloat16, 2**-8), (np.float16, 2**-11), (np.float64, 1e-15)]
)
def test_a_blend_of_files_is_the_weighted_sum_rounded_once(tmp_path, dtype, tolerance):
    checkpoints = open_checkpoints(save(tmp_path, 3, dtype))
    blend_files(checkpoints, ALPHA, tmp_path / "blend.safetensors")
    blend = read(tmp_path / "blend.safetensors")
    for name, value in expected(ALPHA, dtype).items():
        assert blend[name].dtype == checkpoints[0].tensors[name].dtype
        assert np.allclose(blend[name].astype(np.float64), value, rtol=tolerance, atol=tolerance / 4), name


def test_the_blend_of_files_is_the_blend_of_the_loaded_experts(tmp_path):
    paths = save(tmp_path)
    blend_files(open_checkpoints(paths), ALPHA, tmp_path / "files.safetensors")
    save_blend(tmp_path / "memory.safetensors", glue_jax.blend(load_experts(paths), jnp.array(ALPHA)), like=paths[0])
    files, memory = read(tmp_path / "files.safetensors"), read(tmp_path / "memory.safetensors")
    assert all(np.allclose(files[name], memory[name], rtol=1e-6, atol=1e-6) for name in files)


@pytest.mark.parametrize("portion", [1, 7, 16, 1000])
def test_the_sum_does_not_depend_on_its_portions(monkeypatch, portion):
    tensors = [{"w": np.random.default_rng(seed).normal(size=(5, 9)).astype(np.float32)} for seed in range(3)]
    whole = sums.weighted_sums([dict(each) for each in tensors], lambda name: np.array(ALPHA))["w"]
    monkeypatch.setattr(sums, "_PORTION", portion)
    found = sums.weighted_sums([dict(each) for each in tensors], lambda name: np.array(ALPHA))["w"]
    assert np.array_equal(found, whole)
    wanted = sum(a * each["w"].astype(np.float64) for a, each in zip(ALPHA, tensors, strict=True))
    assert found.shape == (5, 9)
    assert np.allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_coefficients_may_differ_from_tensor_to_tensor(tmp_path):
    paths = save(tmp_path)
    blend_files(
        open_checkpoints(paths), lambda name: np.eye(3)[2 if name == "fc1.bias" else 1], tmp_path / "b.safetensors"
    )
    blend = read(tmp_path / "b.safetensors")
    assert np.array_equal(blend["fc1.bias"], read(paths[2])["fc1.bias"])
    assert np.array_equal(blend["fc1.weight"], read(paths[1])["fc1.weight"])


def test_a_folder_keeps_its_files_its_index_and_its_side_files(tmp_path):
    folders = [save_shards(tmp_path / f"model{seed}", seed, jnp.bfloat16) for seed in range(2)]
    out = blend_files(open_checkpoints(folders), [0.5, 0.5], tmp_path / "out", side_files={"glue.json": "{}"})
    assert {path.name for path in out.iterdir()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "glue.json",
    }
    first, index = "model.safetensors.index.json", "weight_map"
    assert json.loads((out / first).read_text())[index] == json.loads((folders[0] / first).read_text())[index]
    assert open_checkpoint(out).metadata["format"] == "pt"


def test_metadata_of_the_first_expert_are_kept(tmp_path):
    out = blend_files(open_checkpoints(save(tmp_path)), ALPHA, tmp_path / "b.safetensors", side_files={"a": "text"})
    metadata = open_checkpoint(out).metadata
    assert metadata["made"] == "by a test"
    assert json.loads(metadata[saving.PROVENANCE_KEY]) == {"a": "text"}


def test_an_orbax_checkpoint_becomes_one(tmp_path):
    for step in (1, 2):
        tree = {"params": {"blocks": [{"w": np.full(2, step, np.float32)}]}, "n": np.zeros((), np.int32)}
        ocp.save(str(tmp_path / f"{step}"), tree)
    out = blend_files(open_checkpoints([tmp_path / "1", tmp_path / "2"]), [0.5, 0.5], tmp_path / "out")
    loaded = ocp.load(str(out))
    assert loaded["params"]["blocks"][0]["w"].tolist() == [1.5, 1.5]


def test_rename_is_undone(tmp_path):
    paths = save(tmp_path)
    rename = lambda name: "params/" + name.replace(".", "/")  # noqa: E731
    bank = load_experts(paths, rename=rename)
    params = jax.tree.map(lambda leaf: leaf[1], bank)
    save_blend(tmp_path / "out.safetensors", params, like=paths[0], rename=rename)
    found, wanted = read(tmp_path / "out.safetensors"), read(paths[1])
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted if "tracked" not in name)
    with pytest.raises(ValueError, match="params holds 'params/more', which rename gives for no tensor"):
        save_blend(tmp_path / "more", {"params": {**params["params"], "more": 1.0}}, like=paths[0], rename=rename)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params | {"more": jnp.ones(2)}, "more is unknown to the first"),
        (lambda params: params | {"fc1.bias": jnp.ones(2)}, r"fc1.bias has shape \(2,\) against \(8,\)"),
        (lambda params: params | {"fc1.bias": jnp.full(8, jnp.nan)}, "params holds nan at fc1.bias"),
        (
            lambda params: params | {"fc1.bias": jnp.ones(8, jnp.int32)},
            "params holds int32 at fc1.bias; expected floating",
        ),
        (lambda params: params | {"fc1.bias": jnp.full(8, 1e6)}, "rounded to float16, holds inf at fc1.bias"),
        (
            lambda params: params | {"bn.running_var": -params["bn.running_var"]},
            r"holds the variance -.* at bn.running_var, .* measure BatchNorm's statistics anew",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path, change, message):
    paths = save(tmp_path, dtype=np.float16)
    params = jax.tree.map(lambda leaf: leaf[0], load_experts(paths))
    with unchanged(tmp_path), pytest.raises(ValueError, match=message):
        save_blend(tmp_path / "out", change(params), like=paths[0])


@pytest.mark.parametrize("alpha", [[0.5, 0.5], [0.5, 0.5, np.nan], 0.5])
def test_coefficients_that_do_not_fit_are_refused(tmp_path, alpha):
    paths = save(tmp_path)
    with unchanged(tmp_path), pytest.raises(ValueError, match=r"the coefficients of .* expected 3 finite numbers"):
        blend_files(open_checkpoints(paths), alpha, tmp_path / "out")


def test_a_weight_that_is_not_finite_names_its_file(tmp_path):
    def change(seed, state):
        state["fc1.weight"][3] = np.inf if seed == 1 else 0
        return state

    paths = save(tmp_path, change=change)
    with unchanged(tmp_path), pytest.raises(ValueError, match=r"expert1\.safetensors holds inf at fc1.weight"):
        blend_files(open_checkpoints(paths), ALPHA, tmp_path / "out")


def test_what_exists_is_replaced_only_on_demand(tmp_path):
    paths, out = save(tmp_path), tmp_path / "out"
    blend_files(open_checkpoints(paths), [1, 0, 0], out)
    before = everything_in(tmp_path)
    with unchanged(tmp_path), pytest.raises(FileExistsError, match="out exists"):
        blend_files(open_checkpoints(paths), ALPHA, out)
    blend_files(open_checkpoints(paths), ALPHA, out, overwrite=True)
    after = everything_in(tmp_path)
    assert after.keys() == before.keys()
    assert after["out/model.safetensors"] != before["out/model.safetensors"]


def test_a_full_disk_is_noticed_before_and_while_it_is_written(tmp_path, monkeypatch):
    paths = save(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    said = r"no space left for .*: it needs 1,04[0-9],[0-9]+ bytes, and 1,000 are free"
    with unchanged(tmp_path), pytest.raises(OSError, match=said):
        blend_files(open_checkpoints(paths), ALPHA, tmp_path / "out")
    monkeypatch.undo()

    def full(*arguments, **words):
        raise RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with unchanged(tmp_path), pytest.raises(OSError, match="No space left on device"):
        blend_files(open_checkpoints(paths), ALPHA, tmp_path / "out")


SLOW_BLEND = """
import sys, time
from glue_jax.checkpoints import blend_files, formats, open_checkpoints
formats._PORTION_BYTES = 1
out, *paths = sys.argv[1:]
print("begins", flush=True)
blend_files(open_checkpoints(paths), [0.5, -0.25, 0.75], out, overwrite=True, on_progress=lambda *_: time.sleep(0.05))
"""


@pytest.mark.parametrize("existing", [True, False])
def test_a_killed_blend_leaves_the_old_result_or_none(tmp_path, existing):
    folders = [save_shards(tmp_path / f"model{seed}", seed) for seed in range(3)]
    out = tmp_path / "out"
    if existing:
        blend_files(open_checkpoints(folders), [1, 0, 0], out)
    before = everything_in(tmp_path)
    command = [sys.executable, "-c", SLOW_BLEND, str(out), *map(str, folders)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial").exists():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.communicate()
    after = everything_in(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith((".out.partial", ".out.lock")) for name in after.keys() - before.keys())
    blend_files(open_checkpoints(folders), ALPHA, out, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    paths, out = save(tmp_path), tmp_path / "out"
    blend_files(open_checkpoints(paths), [1, 0, 0], out)
    out.rename(tmp_path / ".out.old")
    with pytest.raises(FileExistsError, match="out exists"):
        blend_files(open_checkpoints(paths), ALPHA, out)
    assert np.array_equal(read(out)["fc1.bias"], read(paths[0])["fc1.bias"])


@pytest.mark.parametrize("place", ["model0", ".", "model0/blend.safetensors", "model1/more"])
def test_a_blend_never_replaces_what_it_is_made_of(tmp_path, place):
    folders = [save_shards(tmp_path / "experts" / f"model{seed}", seed) for seed in range(2)]
    with unchanged(tmp_path), pytest.raises(ValueError, match=r"which would change .*, one of the inputs"):
        blend_files(open_checkpoints(folders), [0.5, 0.5], tmp_path / "experts" / place, overwrite=True)


@pytest.mark.parametrize("out", ["files", "links", "folder0"])
def test_a_blend_never_replaces_what_links_of_its_experts_lead_to(tmp_path, out):
    (tmp_path / "files").mkdir()
    (tmp_path / "links").mkdir()
    experts = []
    for path in save(tmp_path / "files", 2):
        folder = tmp_path / f"folder{len(experts)}"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(path)
        (tmp_path / "links" / path.name).symlink_to(folder / "model.safetensors")
        experts.append(tmp_path / "links" / path.name if out == "links" else folder)
    with unchanged(tmp_path), pytest.raises(ValueError, match=r"which would change .*, one of the inputs"):
        blend_files(open_checkpoints(experts), [0.5, 0.5], tmp_path / out, overwrite=True)


def test_a_link_to_an_earlier_result_stays_a_link(tmp_path):
    paths = save(tmp_path)
    real = blend_files(open_checkpoints(paths), [1, 0, 0], tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    blend_files(open_checkpoints(paths), ALPHA, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert np.allclose(read(real)["fc1.weight"], expected(ALPHA)["fc1.weight"], atol=1e-6)


def test_weights_in_a_folder_of_an_expert_are_left_out_with_a_warning(tmp_path):
    folders = [save_shards(tmp_path / f"model{seed}", seed) for seed in range(2)]
    (folders[0] / "2_Dense").mkdir()
    (folders[0] / "2_Dense/model.safetensors").write_bytes(b"weights")
    for name in ("source.spm", "tokenizer.model.v3", "LICENSE"):
        (folders[0] / name).write_text("text")
    with pytest.warns(UserWarning, match=r"has weights in \['2_Dense'\] too. They are not blended, nor copied"):
        out = blend_files(open_checkpoints(folders), [0.5, 0.5], tmp_path / "out")
    assert not (out / "2_Dense").exists()
    assert {"source.spm", "tokenizer.model.v3", "LICENSE"} <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("name", ["norm.running_var", "norm/var", "norm/var/value"])
def test_a_variance_is_known_by_its_name(tmp_path, name):
    for seed in range(2):
        save_file({name: np.full(3, 1.0 + seed, np.float32)}, tmp_path / f"{seed}.safetensors")
    with pytest.raises(ValueError, match="holds the variance -1 at"):
        blend_files([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], [3.0, -2.0], tmp_path / "out")


def test_a_folder_that_is_no_result_is_not_replaced(tmp_path):
    paths = save(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("text")
    with pytest.raises(FileExistsError, match="is a folder without weights"):
        blend_files(open_checkpoints(paths), ALPHA, tmp_path / "thesis", overwrite=True)


def test_two_processes_do_not_write_one_place(tmp_path):
    paths, out = save(tmp_path), tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_BLEND, str(out), *map(str, paths)], stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / ".out.partial").exists() and not out.exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        if not out.exists():
            with pytest.raises(BlockingIOError, match="another process writes"):
                blend_files(open_checkpoints(paths), ALPHA, out)
        process.send_signal(signal.SIGCONT)
        process.communicate()
    assert np.allclose(read(out)["fc1.weight"], expected(ALPHA)["fc1.weight"], atol=1e-6)


def test_one_file_with_an_index_stays_one(tmp_path):
    folders = [save_shards(tmp_path / f"model{seed}", seed) for seed in range(2)]
    for folder in folders:
        state = read(folder)
        for file in folder.glob("*.safetensors"):
            file.unlink()
        save_file(state, folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").unlink()
        map_of = dict.fromkeys(state, "model-00001-of-00001.safetensors")
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": map_of}))
    out = blend_files(open_checkpoints(folders), [0.5, 0.5], tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        "model-00001-of-00001.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "config.json",
    }


def test_small_folders_are_copied_and_weights_of_other_formats_are_not(tmp_path):
    folders = [save_shards(tmp_path / f"model{seed}", seed) for seed in range(2)]
    (folders[0] / "1_Pooling").mkdir()
    (folders[0] / "1_Pooling" / "config.json").write_text("{}")
    (folders[0] / "checkpoint-5").mkdir()
    (folders[0] / "checkpoint-5" / "config.json").write_text("{}")
    (folders[0] / "checkpoint-5" / "model.safetensors").write_bytes(b"weights")
    for name in ("rust_model.ot", "rust.model.ot", "weights", "weights.npz", ".env", "model.onnx_data"):
        (folders[0] / name).write_bytes(b"secret")
    with pytest.warns(UserWarning, match=r"has weights in \['checkpoint-5'\] too"):
        out = blend_files(open_checkpoints(folders), [0.5, 0.5], tmp_path / "out")
    side = {name for name in everything_in(out) if not name.startswith("model")}
    assert side == {"config.json", "1_Pooling/config.json"}
