"""The documentation: its code runs, its links lead somewhere, and it has every public name."""

import ast
import contextlib
import functools
import importlib
import io
import re
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from glue_jax import checkpoints
from glue_jax.checkpoints import objective
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
API = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
DOCUMENTED = set(re.findall(r"^::: (\S+)$", API, re.MULTILINE))
MODULES = sorted(name for name in glue_jax.__all__ if isinstance(getattr(glue_jax, name), type(glue_jax)))


def _blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@functools.cache
def _run(path, uncomment=None):
    """Runs a page's blocks in one namespace, as a reader does who pastes one after the other; returns what is there.

    Args:
        path: of the page.
        uncomment: a pattern of lines that are commented out on the page, and run here.
    """
    namespace = {"__name__": path.stem}
    # A reader's JAX has its own settings, not those of the tests. What the page writes is deleted.
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        jax.numpy_rank_promotion("allow"),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        for block in _blocks(path):
            code = re.sub(rf"^# (?={uncomment})", "", block, flags=re.MULTILINE) if uncomment else block
            exec(compile(code, str(path), "exec"), namespace)
    return {**namespace, "printed": printed.getvalue()}


def _with_code():
    return [path for path in PAGES if _blocks(path)]


# The others are run by the tests below, and by test_my_experts.py.
@pytest.mark.parametrize(
    "path",
    [path for path in _with_code() if path.stem not in ("getting-started", "collapsed-blends", "my-experts", "README")],
    ids=lambda path: path.stem,
)
def test_the_code_of_a_page_runs(path):
    _run(path)


def test_the_example_of_readme_prints_what_it_says():
    path = ROOT / "README.md"
    (block,) = _blocks(path)
    said = ast.literal_eval(block.rstrip().rsplit("# ", 1)[1])
    prior, *experts = ast.literal_eval(_run(path)["printed"])
    np.testing.assert_allclose([prior, *experts], said, atol=0.011)
    assert prior < min(experts)


def test_getting_started_prints_what_it_says():
    path = ROOT / "docs" / "getting-started.md"
    namespace = _run(path)
    numbers = r"error rate is (.*), the uniform average's (.*), the experts' (.*), (.*) and (.*)\."
    shown = re.search(numbers, path.read_text())
    assert shown is not None
    errors = ast.literal_eval(namespace["printed"].splitlines()[0])
    np.testing.assert_allclose([float(text) for text in shown.groups()], errors, atol=6e-4)
    assert errors[0] < min(errors[1:])
    jax.tree.map(np.testing.assert_array_equal, namespace["again"], namespace["model"])
    # Two short runs are one long run.
    assert len(namespace["second"].history.metrics.loss) == 80
    assert namespace["metrics"].probe_losses.shape == (1, 2)
    assert jnp.argmax(glue_jax.alpha(namespace["state"])) == 1


@pytest.mark.parametrize("aligned", [False, True])
def test_the_whole_way_lifts_the_blend_above_every_expert(aligned):
    namespace = _run(ROOT / "docs" / "collapsed-blends.md", "experts =" if aligned else None)
    network, target, validation = (namespace[name] for name in ("Network", "target", "validation"))
    prior, coarse, fine = (namespace[name] for name in ("prior", "coarse", "fine"))
    assert (namespace["experts"] is namespace["alignment"].experts) == aligned
    assert set(namespace["groups"].names) == {"norms", "Dense_0", "Dense_1"}
    first, *others = fine.alpha
    assert all(jnp.abs(first - other).max() > 1e-3 for other in others)
    assert fine.history.validation_values.min() < coarse.history.validation_values.min()
    # Its own statistics, on all target data, serve a network in evaluation mode.
    hidden = np.asarray(nn.Dense(32).apply({"params": prior["params"]["Dense_0"]}, target["x"]))
    statistics = prior["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], hidden.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(statistics["var"], hidden.var(axis=0), rtol=1e-4)
    with jax.numpy_rank_promotion("allow"):
        logits = network().apply(prior, validation["x"])
        accuracies = jax.vmap(namespace["accuracy"])(namespace["experts"])
    assert jnp.mean(logits.argmax(axis=1) == validation["y"]) > max(accuracies)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_to_one(path):
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        assert re.search(rf" {re.escape(path.relative_to(ROOT / 'docs').as_posix())}$", navigation, re.MULTILINE)


def test_every_name_of_the_package_is_on_an_api_page():
    assert {f"glue_jax.{name}" for name in glue_jax.__all__} <= DOCUMENTED


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_of_a_module_is_on_an_api_page(name):
    missing = {f"glue_jax.{name}.{each}" for each in _public_names(getattr(glue_jax, name))} - DOCUMENTED
    assert not missing


def test_every_public_name_of_the_package_of_files_is_on_an_api_page():
    # `import glue_jax` does not import it.
    assert {f"glue_jax.checkpoints.{name}" for name in checkpoints.__all__} <= DOCUMENTED


def test_the_page_of_files_names_every_function_of_an_objective_file():
    text = (ROOT / "docs" / "api" / "checkpoints.md").read_text()
    shown = set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE))
    assert shown == set(objective.FUNCTIONS)


def test_every_documented_name_is_there():
    for name in DOCUMENTED:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) if module else name == "glue_jax", name


def _public_names(module):
    """A module's `__all__`, or the public names that it defines itself."""
    if hasattr(module, "__all__"):
        return module.__all__
    names = []
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]
