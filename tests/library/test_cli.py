"""`glue-jax`, as its user runs it: one clear line and a status for each mistake, and nothing written."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from glue_jax.checkpoints import kept_results
from glue_jax.checkpoints.objective import load_objective
from glue_jax.cli import main
from tests.library.checkpoints.helpers import expected, read, save, unchanged, weights

OBJECTIVE = """
import jax.numpy as jnp
import numpy as np


def load_data():
    x = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
    return {"x": x, "y": np.argmax(x[:, :3], axis=1)}


def outputs(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["fc1.weight"].T + params["fc1.bias"][None])
    return hidden @ params["fc2.weight"].T


def loss(outputs, batch):
    return -jnp.mean(jnp.take_along_axis(jnp.log(jnp.exp(outputs) / jnp.exp(outputs).sum(1, keepdims=True)),
                                         batch["y"][:, None], axis=1))
"""
LEARN = ["--batch-size", "32", "--max-steps", "10"]
E1, E = "expert1.safetensors", ["expert0.safetensors", "expert1.safetensors", "expert2.safetensors"]
BLEND, UNIFORM = ["blend", *E, "--out", "out"], ["blend", *E, "--uniform", "--out", "out"]
LEARNS = ["learn", *E, "--objective", "objective.py", "--out", "out", *LEARN]


@pytest.fixture
def experts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "objective.py").write_text(OBJECTIVE)
    return [path.name for path in save(tmp_path)]


def run(capsys, *arguments):
    """The status, and the lines on stdout and stderr."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_inspect_names_the_outlier_and_draws(experts, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'glue_jax[experiments]'")
    base = weights(9)
    for seed in range(3):
        change = weights(seed)
        near = {name: np.asarray(value + 0.01 * change[name], value.dtype) for name, value in base.items()}
        save_file(near, tmp_path / f"near{seed}.safetensors")
    near = [f"near{seed}.safetensors" for seed in range(3)]
    status, out, _ = run(capsys, "inspect", *near, experts[0], "--picture", "similarity.png")
    assert status == 0
    assert next(line for line in out.splitlines() if line.endswith("(outlier)")).split()[2:4] == ["3", experts[0]]
    assert "Expert 3 is an outlier" in out
    assert (tmp_path / "similarity.png").stat().st_size > 10_000


def test_blend_writes_the_blend_and_where_it_comes_from(experts, tmp_path, capsys):
    status, out, _ = run(capsys, "blend", *experts, "--weights", "0.5", "-0.25", "0.75", "--out", "out")
    assert status == 0
    assert "+0.7500  expert2.safetensors" in out
    blend = read(tmp_path / "out")
    assert all(np.allclose(blend[name], value, atol=1e-6) for name, value in expected([0.5, -0.25, 0.75]).items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "glue.json", "README.md"}
    assert run(capsys, "blend", *experts, "--weights-from", "out", "--out", "again")[0] == 0
    assert all(np.array_equal(value, read(tmp_path / "again")[name]) for name, value in blend.items())


def test_uniform_is_the_average(experts, tmp_path, capsys):
    assert run(capsys, "blend", *experts, "--uniform", "--out", "out.safetensors")[0] == 0
    blend = read(tmp_path / "out.safetensors")
    assert np.allclose(blend["fc1.weight"], expected([1 / 3] * 3)["fc1.weight"], atol=1e-6)


@pytest.mark.parametrize("groups", ["layers", "none"])
def test_learn_writes_the_best_model_and_why_it_is_the_best(experts, tmp_path, capsys, groups):
    status, out, _ = run(capsys, *LEARNS, "--groups", groups)
    assert status == 0
    made = json.loads((tmp_path / "out/glue.json").read_text())
    values = made["learned"]["values"]
    assert values[made["learned"]["chosen"]] == min(values.values()) < values["uniform average"]
    assert ("learned by group" in values) == (groups == "layers")
    assert made["learned"]["chosen"] in out
    alpha = {name: group["alpha"] for group in made["groups"] for name in group["tensors"]}
    states = [weights(seed) for seed in range(3)]
    wanted = sum(a * state["fc1.weight"] for a, state in zip(alpha["fc1.weight"], states, strict=True))
    assert np.allclose(read(tmp_path / "out")["fc1.weight"], wanted, atol=1e-5)
    assert not (tmp_path / "out.state.npz").exists()


def test_learn_takes_a_number_that_python_computes(experts, tmp_path, capsys):
    (tmp_path / "objective.py").write_text(
        "import numpy as np\ncalls = []\n\n\ndef evaluate(params):\n    calls.append(0)\n"
        "    if len(calls) == 12:\n        raise RuntimeError('the server is down')\n"
        "    return float(np.square(np.asarray(params['fc1.weight'])).sum())\n"
    )
    status, _, _ = run(capsys, "learn", *experts, "--objective", "objective.py", "--out", "out", "--max-steps", "8")
    assert status == 0
    values = json.loads((tmp_path / "out/glue.json").read_text())["learned"]["values"]
    assert values["learned"] <= values["uniform average"]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_bits(experts, tmp_path, capsys, monkeypatch, stop_after):
    arguments = ["learn", *experts, "--objective", "objective.py", *LEARN, "--out"]
    assert run(capsys, *arguments, "whole")[0] == 0
    calls, save_results = [], kept_results.save

    def stopping(*values):
        save_results(*values)
        calls.append(0)
        if len(calls) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(kept_results, "save", stopping)
    status, _, err = run(capsys, *arguments, "parts")
    assert status == 130
    assert err.startswith("glue-jax: stopped; the same command continues")
    assert not (tmp_path / "parts").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *arguments, "parts")[0] == 0
    whole, parts = (json.loads((tmp_path / name / "glue.json").read_text()) for name in ("whole", "parts"))
    assert whole["groups"] == parts["groups"]
    assert whole["learned"]["values"] == parts["learned"]["values"]
    models = [read(tmp_path / name) for name in ("whole", "parts")]
    assert all(np.array_equal(models[0][name], models[1][name]) for name in models[0])


def test_a_metric_chooses_the_model(experts, tmp_path, capsys):
    metric = "\n\ndef metric(outputs, batch):\n    return jnp.mean(outputs.argmax(1) != batch['y'])\n"
    (tmp_path / "objective.py").write_text(OBJECTIVE + metric)
    assert run(capsys, *LEARNS)[0] == 0
    values = json.loads((tmp_path / "out/glue.json").read_text())["learned"]["values"].values()
    # A fifth of 96 examples is held out: 19.
    assert all(np.isclose(value * 19, round(value * 19), atol=1e-4) for value in values)


SPEC = """

def spec(params):
    import glue_jax
    return glue_jax.merging.chain_spec(params, ["fc1", "fc2"], kernel_layout="out_in")
"""


def test_experts_in_another_order_of_units_are_aligned(experts, tmp_path, capsys):
    first, last = np.eye(4, dtype=np.float32), 3 * np.eye(3, 4, dtype=np.float32)
    state = {"fc1.weight": np.vstack([first, -first]), "fc1.bias": np.zeros(8, np.float32)}
    state["fc2.weight"] = np.hstack([last, -last])
    # Like units are far apart in this order.
    order = np.array([5, 4, 7, 6, 1, 0, 3, 2])
    moved = {"fc1.weight": state["fc1.weight"][order], "fc1.bias": state["fc1.bias"][order]}
    moved["fc2.weight"] = np.ascontiguousarray(state["fc2.weight"][:, order])
    for index, each in enumerate((state, moved)):
        save_file(each, tmp_path / f"order{index}.safetensors")
    files = ["order0.safetensors", "order1.safetensors"]
    (tmp_path / "objective.py").write_text(OBJECTIVE + SPEC)
    status, out, _ = run(capsys, "learn", *files, "--objective", "objective.py", "--out", "out", *LEARN)
    assert status == 0
    made = json.loads((tmp_path / "out/glue.json").read_text())["learned"]
    assert made["aligned"]
    # The two are one network, and so is their aligned average.
    assert np.isclose(made["values"]["aligned average"], made["values"]["expert 0"], rtol=1e-4)
    assert "so the aligned experts are blended" in out
    status, _, err = run(capsys, "blend", *files, "--weights-from", "out", "--out", "again")
    assert (status, "its experts were aligned" in err) == (1, True)


@pytest.mark.parametrize(("estimator", "name"), [("auto", "Gauss-Newton"), ("spsa", "SPSA")])
def test_the_estimator_may_be_chosen(experts, tmp_path, capsys, estimator, name):
    assert run(capsys, *LEARNS, "--estimator", estimator)[0] == 0
    assert json.loads((tmp_path / "out/glue.json").read_text())["learned"]["estimator"] == name


def test_tied_weights_have_one_coefficient(experts, tmp_path, capsys):
    tied = {"head.weight": "fc2.weight", "other.bias": "fc1.bias"}
    zeros = {name: np.zeros(8, np.float32) for name in ("zeros.bias", "zeros2.bias")}
    for seed, path in enumerate(experts):
        state = weights(seed)
        save_file(state | {name: state[other].copy() for name, other in tied.items()} | zeros, path)
    assert run(capsys, *LEARNS)[0] == 0
    made = json.loads((tmp_path / "out/glue.json").read_text())
    assert made["learned"]["chosen"] == "learned by group"
    group_of = {name: group["name"] for group in made["groups"] for name in group["tensors"]}
    assert {name: group_of[name] for name in (*tied, *zeros)} == {
        "head.weight": "fc2",
        "other.bias": "fc1",
        "zeros.bias": "zeros",
        "zeros2.bias": "zeros2",
    }
    blend = read(tmp_path / "out")
    assert np.array_equal(blend["head.weight"], blend["fc2.weight"])
    assert np.array_equal(blend["other.bias"], blend["fc1.bias"])


def test_an_objective_may_have_classes_and_modules_beside_it(experts, tmp_path, capsys):
    (tmp_path / "beside_it.py").write_text("scale = 1.0\n")
    head = "from __future__ import annotations\nimport dataclasses\nfrom beside_it import scale\n\n\n"
    head += "@dataclasses.dataclass\nclass Options:\n    scale: float = scale\n"
    (tmp_path / "objective.py").write_text(head + OBJECTIVE)
    assert run(capsys, *LEARNS)[0] == 0
    assert not (tmp_path / "__pycache__").exists()


def test_a_blend_with_batch_norm_comes_with_a_warning(experts, tmp_path, capsys):
    status, _, err = run(capsys, "blend", *experts, "--uniform", "--out", "first")
    assert status == 0
    assert err.startswith("glue-jax: warning: the experts have BatchNorm.")
    for seed, path in enumerate(experts):
        save_file({name: leaf for name, leaf in weights(seed).items() if not name.startswith("bn")}, path)
    assert run(capsys, "blend", *experts, "--uniform", "--out", "second")[2] == ""


@pytest.fixture
def stopped(monkeypatch, tmp_path, capsys):
    """A function that begins to learn, and stops when the first results are kept."""

    def stop(*values):
        save_results(*values)
        raise KeyboardInterrupt

    save_results = kept_results.save

    def stopped(*options):
        with monkeypatch.context() as patch:
            patch.setattr(kept_results, "save", stop)
            status, _, err = run(capsys, *LEARNS, *options)
        assert status == 130
        return err

    return stopped


def test_a_stopped_run_of_another_objective_is_not_continued(experts, tmp_path, capsys, stopped):
    assert "; the same command continues" in stopped()
    (tmp_path / "objective.py").write_text(OBJECTIVE.replace("default_rng(0)", "default_rng(1)"))
    status, _, err = run(capsys, *LEARNS)
    assert status == 1
    assert "to a stopped run with other objective and data; expected the same" in err
    assert "; the same command without --fresh continues" in stopped("--fresh")
    assert run(capsys, *LEARNS)[0] == 0


def test_a_stopped_run_with_another_module_in_a_package_is_not_continued(experts, tmp_path, capsys, stopped):
    (tmp_path / "of_the_objective").mkdir()
    module = tmp_path / "of_the_objective/network.py"
    module.write_text("scale = 1.0\n")
    (tmp_path / "objective.py").write_text("from of_the_objective.network import scale\n" + OBJECTIVE)
    stopped()
    module.write_text("scale = 100.0\n")
    status, _, err = run(capsys, *LEARNS)
    assert status == 1
    assert "to a stopped run with other objective; expected the same" in err


def test_a_module_beside_an_objective_counts_whatever_its_path_looks_like(tmp_path, monkeypatch):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")
    (tmp_path / "real" / "objective.py").write_text("from counted import scale\ndef evaluate(params): return scale\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    digests = []
    for text in ("scale = 1.0\n", "scale = 1000.0\n"):
        (tmp_path / "real" / "counted.py").write_text(text)
        sys.modules.pop("counted", None)
        # The folder above that of the link is not the one above its target.
        digests.append(load_objective(Path("link/../objective.py")).digest)
    assert len(set(digests)) == 2
    sys.modules.pop("counted")


def test_the_record_has_the_hashes_of_what_was_read(experts, tmp_path, capsys):
    before = [hashlib.sha256((tmp_path / path).read_bytes()).hexdigest() for path in experts]
    (tmp_path / "objective.py").write_text(
        "def evaluate(params):\n    with open('expert2.safetensors', 'ab') as file:\n        file.write(b'more')\n"
        "    return float(abs(params['fc1.weight']).sum())\n"
    )
    status, out, _ = run(capsys, "learn", *experts, "--objective", "objective.py", "--out", "out", "--max-steps", "2")
    assert status == 0
    assert "expert 2 is expert2.safetensors" in out
    made = json.loads((tmp_path / "out/glue.json").read_text())
    assert [hash for expert in made["experts"] for hash in expert["sha256"].values()] == before


def nan(folder):
    state = weights(1)
    state["fc1.bias"][2] = np.nan
    save_file(state, folder / "expert1.safetensors")


def missing_tensor(folder):
    state = weights(1)
    del state["fc1.bias"]
    save_file(state, folder / "expert1.safetensors")


def lora(folder):
    save_file({"a.lora_A.weight": np.ones((2, 3), np.float32)}, folder / "expert1.safetensors")


def adapter(folder):
    (folder / "expert1").mkdir()
    (folder / "expert1/adapter_config.json").write_text("{}")


def pointer(folder):
    (folder / "expert1.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def objective(text):
    return lambda folder: (folder / "objective.py").write_text(text)


FOLDER = ["blend", E[0], "expert1", "--uniform", "--out", "out"]
DATA = "import numpy as np\ndef load_data(): return {'x': np.ones((40, 4), 'f')}\n"
MISTAKES = {
    "no such file": (
        None,
        ["blend", "no.safetensors", E1, "--uniform", "--out", "out"],
        "no.safetensors does not exist",
    ),
    "no such ending": (None, ["blend", "objective.py", E1, "--uniform", "--out", "out"], "has the ending '.py'"),
    "NaN": (nan, UNIFORM, "expert1.safetensors holds nan at fc1.bias"),
    "NaN, inspected": (nan, ["inspect", *E], "expert1.safetensors holds nan at fc1.bias"),
    "missing tensor": (missing_tensor, LEARNS, "fc1.bias is missing"),
    "take-first": (None, [*UNIFORM, "--take-first", "fc1"], "take_first has 'fc1', which matches"),
    "factors of LoRA": (lora, UNIFORM, "a factor of a LoRA adapter"),
    "an adapter and a model": (adapter, FOLDER, "is an adapter of PEFT, but expert0.safetensors is not"),
    "no coefficients": (None, BLEND, "one of the arguments --weights --uniform --weights-from is required"),
    "two coefficients": (None, [*BLEND, "--weights", "0.5", "0.5"], "--weights has 2 numbers, but there are 3 experts"),
    "a word": (None, [*BLEND, "--weights", "0.5", "half", "0"], "invalid float value: 'half'"),
    "a sum of 0.9": (None, [*BLEND, "--weights", "0.3", "0.3", "0.3"], "--weights has the sum 0.9; expected 1"),
    "NaN as a coefficient": (None, [*BLEND, "--weights", "nan", "0", "1"], "--weights is [nan, 0.0, 1.0]"),
    "a number as coefficients": (
        lambda folder: (folder / "glue.json").write_text('{"groups": [{"name": "a", "alpha": 1, "tensors": []}]}'),
        [*BLEND, "--weights-from", "glue.json"],
        "glue.json is no record of a blend",
    ),
    "out in PyTorch's format": (None, ["blend", *E, "--uniform", "--out", "a.pt"], "expected a folder, or a file with"),
    "a negative variance": (None, [*BLEND, "--weights", "21", "-10", "-10"], "holds the variance"),
    "an expert twice": (None, ["blend", E1, f"./{E1}", "--uniform", "--out", "out"], "are one expert; expected each"),
    "a pointer of Git LFS": (pointer, UNIFORM, "expert1.safetensors is a pointer of Git LFS"),
    "a home of nobody": (None, ["blend", *E, "--uniform", "--out", "~nobody-here/out"], "~nobody-here/out names no"),
    "a text is no result": (None, [*UNIFORM[:-1], "objective.py", "--overwrite"], "is a file without weights"),
    "out is an expert": (None, ["blend", *E, "--uniform", "--overwrite", "--out", E1], "one of the inputs"),
    "out is the folder": (None, ["blend", *E, "--uniform", "--overwrite", "--out", "."], "one of the inputs"),
    "no record": (None, [*BLEND, "--weights-from", "objective.py"], "objective.py is no record of a blend"),
    "out exists": (lambda folder: (folder / "out").mkdir(), UNIFORM, "out exists; expected a new path"),
    "no folder for out": (None, ["blend", *E, "--uniform", "--out", "no/out"], "the folder of no/out does not exist"),
    "full disk": (None, UNIFORM, "no space left for out"),
    "one expert": (None, ["inspect", E1], "1 expert was given; expected at least two"),
    "a picture of text": (None, ["inspect", *E, "--picture", "a.txt"], "--picture is a.txt; expected the ending .png"),
    "steps of files": (None, [*UNIFORM, "--last", "2"], "steps and last choose checkpoints of one run"),
    "subtree of a flat file": (None, [*UNIFORM, "--subtree", "params"], "a safetensors file is flat"),
    "no objective": (lambda folder: (folder / "objective.py").unlink(), LEARNS, "objective.py does not exist"),
    "wrong Python": (objective("def"), LEARNS, "raised SyntaxError"),
    "an error in load_data": (
        objective("def loss_fn(p, b): ...\ndef load_data():\n    return {}['x']"),
        LEARNS,
        "objective.py, line 3: load_data raised KeyError: 'x'",
    ),
    "an error in the loss": (
        objective(DATA + "def loss_fn(params, batch):\n    return batch['z']"),
        LEARNS,
        "objective.py, line 4: loss_fn raised KeyError: 'z'",
    ),
    "nothing to learn by": (objective("a = 3"), LEARNS, "defines none of module, outputs, loss_fn, evaluate"),
    "two things to learn by": (
        objective("def loss_fn(): ...\ndef evaluate(): ..."),
        LEARNS,
        "defines loss_fn and evaluate of",
    ),
    "outputs without a loss": (objective(DATA + "def outputs(params, batch): ..."), LEARNS, "but no loss"),
    "a metric of the weights": (
        objective(DATA + "def loss_fn(params, batch): ...\ndef metric(outputs, batch): ..."),
        LEARNS,
        "defines metric and loss_fn",
    ),
    "no outputs": (
        objective(DATA + "def loss_fn(params, batch): return 1.0"),
        [*LEARNS, "--estimator", "gauss-newton"],
        "--estimator is gauss-newton; expected an objective with module or outputs",
    ),
    "no data": (objective("def loss_fn(params, batch): ..."), LEARNS, "but no load_data"),
    "data of another shape": (
        objective(DATA + "def outputs(params, batch): return batch['x'] @ np.ones((7, 2))\ndef loss(out, batch): ..."),
        LEARNS,
        "objective.py, line 3: outputs raised TypeError: dot_general requires contracting dimensions",
    ),
    "data that the function takes for a dict": (
        objective(
            "import numpy as np\ndef load_data(): return np.ones((8, 4), 'float32'), np.zeros(8, int)\n"
            "def outputs(params, batch): return batch['x']\ndef loss(out, batch): ..."
        ),
        LEARNS,
        "must be integers or slices, not str (given {",
    ),
    "a name that no tensor has": (
        objective(DATA + "def outputs(params, batch): return params['fc1']\ndef loss(out, batch): ..."),
        LEARNS,
        "outputs raised KeyError: 'fc1' (given {'",
    ),
    "a loss without a mean": (
        objective(DATA + "def loss_fn(params, batch): return batch['x'].sum(1)"),
        LEARNS,
        "loss_fn returned float32[",
    ),
    "statistics beside evaluate": (
        objective("def evaluate(params): ...\ndef statistics_fn(params, batch): ..."),
        LEARNS,
        "defines evaluate and ['statistics_fn']",
    ),
    "statistics beside a module": (
        objective(DATA + "def module(): ...\ndef statistics_fn(params, batch): ..."),
        LEARNS,
        "expected module alone, which has its statistics",
    ),
    "labels are one-hot": (
        objective("import numpy as np\ndef module(): ...\ndef load_data(): return np.ones((3, 4)), np.eye(3)"),
        LEARNS,
        "float64 labels [3, 3] that look like classes (one-hot, probabilities, or 0 and 1); expected integers [N]",
    ),
    "labels are true or false": (
        objective("import numpy as np\ndef module(): ...\ndef load_data(): return np.ones((3, 4)), np.ones(3) > 0"),
        LEARNS,
        "bool labels [3] that look like classes",
    ),
    "labels are words": (
        objective("import numpy as np\ndef module(): ...\ndef load_data(): return np.ones((2, 4)), ['a', 'b']"),
        LEARNS,
        "load_data returned ",
    ),
    "a number as data": (
        objective("def loss_fn(params, batch): ...\ndef load_data(): return 3"),
        LEARNS,
        "load_data returned int64 []; expected arrays [N, ...]",
    ),
    "a loader as data": (
        objective("def loss_fn(params, batch): ...\ndef load_data(): return iter([])"),
        LEARNS,
        "load_data returned a list_iterator; expected arrays [N, ...]",
    ),
    "a loss that is no number": (
        objective(DATA + "def loss_fn(params, batch): return 'low'"),
        LEARNS,
        "loss_fn returned 'low'; expected",
    ),
    "a loss that is NaN": (
        objective(DATA + "def loss_fn(params, batch): return batch['x'].sum() * float('nan')"),
        LEARNS,
        "expected a finite number from the loss (look in the functions and the labels for a division by 0",
    ),
    "a function that is none": (objective("evaluate = 3"), LEARNS, "evaluate is 3; expected a function"),
    "no server": (objective("def evaluate(params): raise OSError('no server')"), LEARNS[:-4], "no server"),
    "minibatches of a number": (
        objective("def evaluate(params): return 1.0"),
        LEARNS,
        "evaluate was given together with batch_size",
    ),
    "a base without adapters": (None, [*LEARNS, "--base", E1], "expected no --base"),
    "an option of another command": (None, [*LEARNS, "--uniform"], "--uniform (see glue-jax learn --help)"),
    "half an option": (None, [*LEARNS, "--group", "none"], "--group none (see glue-jax learn --help)"),
    "a negative number of steps": (None, [*LEARNS, "--max-steps", "-3"], "max_steps is -3"),
}


@pytest.mark.parametrize("options", [[], ["--estimator", "spsa"]])
@pytest.mark.parametrize("way", ["def outputs(p, batch): return batch['x'] @ np.ones((7, 2))", "loss_fn = None"])
def test_data_are_checked_before_anything_is_learned(experts, tmp_path, capsys, monkeypatch, way, options):
    if way == "loss_fn = None":
        way = "def loss_fn(p, batch): return (batch['x'] @ np.ones((7, 2))).sum()"
    objective(DATA + way + "\ndef loss(outputs, batch): return outputs.sum()")(tmp_path)
    monkeypatch.setattr("glue_jax.build_prior", lambda *given, **words: pytest.fail("it was reached"))
    status, _, err = run(capsys, *LEARNS, *options)
    assert status == 1
    assert "raised TypeError: dot_general requires contracting dimensions" in err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_writes_nothing(experts, tmp_path, capsys, monkeypatch, mistake):
    prepare, arguments, message = MISTAKES[mistake]
    if prepare:
        prepare(tmp_path)
    if mistake == "full disk":
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with unchanged(tmp_path):
        status, out, err = run(capsys, *arguments)
    assert status in (1, 2)
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1, err


def test_the_module_is_the_command_and_its_help_has_examples():
    shown = subprocess.run(
        [sys.executable, "-m", "glue_jax", "learn", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "usage: glue-jax learn" in shown
    assert "glue-jax learn a.pt b.pt c.pt --objective objective.py --out blend" in shown


def save_adapter(folder, seed, rank):
    """Writes an adapter of PEFT for the weight `fc1`, of scaling 2."""
    random = np.random.default_rng(seed)
    factors = {"A": random.normal(size=(rank, 4)), "B": random.normal(size=(8, rank))}
    folder.mkdir()
    names = {f"base_model.model.fc1.lora_{name}.weight": value for name, value in factors.items()}
    save_file({name: value.astype(np.float32) for name, value in names.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": rank, "lora_alpha": 2 * rank}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["fc1"]}))
    return 2 * factors["B"] @ factors["A"]


def change_of(folder):
    """The change of the weight by an adapter that a command wrote, with its scaling."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = read(folder)
    a, b = (factors[f"base_model.model.fc1.lora_{name}.weight"] for name in "AB")
    assert len(a) == config["r"]
    return config["lora_alpha"] / config["r"] * b @ a


def test_adapters_are_blended_exactly(experts, tmp_path, capsys):
    changes = [save_adapter(tmp_path / f"adapter{seed}", seed, rank) for seed, rank in enumerate((2, 1))]
    arguments = ["blend", "adapter0", "adapter1", "--weights", "1.5", "-0.5", "--out", "out"]
    assert run(capsys, *arguments)[0] == 0
    assert np.allclose(change_of(tmp_path / "out"), 1.5 * changes[0] - 0.5 * changes[1], atol=1e-5)
    assert json.loads((tmp_path / "out/glue.json").read_text())["groups"][0]["alpha"] == [1.5, -0.5]
    status, out, _ = run(capsys, "inspect", "adapter0", "adapter1")
    assert (status, "at most the rank 3 in each of 1 modules" in out) == (0, True)


def test_adapters_are_learned_on_their_base(experts, tmp_path, capsys):
    for seed in range(2):
        save_adapter(tmp_path / f"adapter{seed}", seed, 2)
    arguments = ["learn", "adapter0", "adapter1", "--objective", "objective.py", "--out", "out", *LEARN]
    status, _, err = run(capsys, *arguments)
    assert (status, len(err.splitlines())) == (1, 1)
    assert "--base is None; expected the base of adapters" in err
    status, out, _ = run(capsys, *arguments, "--base", experts[0])
    assert status == 0
    values = json.loads((tmp_path / "out/glue.json").read_text())["learned"]["values"]
    assert min(values, key=values.get).startswith("learned")
    assert np.linalg.matrix_rank(change_of(tmp_path / "out"), tol=1e-4) == 4
    # Cosines between factors of adapters say nothing.
    assert "related" not in out


TORCH_OBJECTIVE = """
import numpy as np
import torch


def module():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def load_data():
    x = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)
"""


def test_a_pytorch_user_writes_a_module_and_its_data_and_loads_the_result(tmp_path, capsys, monkeypatch):
    reason = "PyTorch or torchax is not installed: pip install 'glue_jax[foreign]'"
    torch, _ = (pytest.importorskip(name, reason=reason) for name in ("torch", "torchax"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "objective.py").write_text(TORCH_OBJECTIVE)
    namespace = {}
    exec(TORCH_OBJECTIVE, namespace)
    module, (x, y) = namespace["module"](), namespace["load_data"]()
    for seed in range(3):
        torch.manual_seed(seed)
        module = namespace["module"]()
        module(torch.tensor(x[:50] + seed))
        torch.save(module.state_dict(), f"{seed}.pt")
    status, _, _ = run(capsys, "learn", "0.pt", "1.pt", "2.pt", "--objective", "objective.py", "--out", "out", *LEARN)
    assert status == 0
    made = json.loads((tmp_path / "out/glue.json").read_text())["learned"]
    assert made["values"][made["chosen"]] < made["values"]["uniform average"]
    assert made["statistics_refreshed"] == (not made["chosen"].startswith("expert"))
    state = {name: torch.tensor(value) for name, value in read(tmp_path / "out").items()}
    module.load_state_dict(state, strict=True)
    # Its statistics are those of the data, not averages of the experts'.
    hidden = module[0](torch.tensor(x)).detach()
    assert np.allclose(state["1.running_mean"], hidden.mean(0), atol=0.15)
    module.eval()
    loss = torch.nn.functional.cross_entropy(module(torch.tensor(x)), torch.tensor(y))
    assert loss < made["values"]["uniform average"]
