import ast
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT

ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
# For a loaded machine; each takes half a minute at most on two cores that are not.
CELL_TIMEOUT = 300


def _read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _execute(notebook, folder):
    """Runs all cells, in a new kernel that is started as from notebooks/; an error in a cell is raised."""
    environment = {
        **os.environ,
        "GLUE_JAX_NOTEBOOK_SCALE": "small",
        # Most of the time is compilation.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "IPYTHONDIR": str(folder),
    }
    # Pictures are shown by the kernel's own backend, which yields to this variable.
    environment.pop("MPLBACKEND", None)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    client.execute(env=environment)
    assert not [output for cell in _code(notebook) for output in cell.outputs if output.output_type == "error"]
    return notebook


def _shown(notebook, kind):
    """What a notebook shows of a MIME type: by cell, the outputs of each that has any."""
    shown = {
        cell.id: [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]
        for cell in _code(notebook)
    }
    return {cell: outputs for cell, outputs in shown.items() if outputs}


def test_the_quickstart_runs_from_a_clean_kernel(tmp_path):
    notebook = _execute(_read("quickstart"), tmp_path)
    assert {cell: len(shown) for cell, shown in _shown(notebook, "image/png").items()} == {
        "alpha-figure": 1,
        "fine-tuning-figure": 1,
    }
    tables = _shown(notebook, "text/markdown")
    assert list(tables) == ["expert-table", "alpha-table", "priors"]
    (priors,) = tables["priors"]
    for model in ("GLUE's prior", "full gradient's prior", "uniform average", "best expert"):
        assert re.search(rf"^\| {model} \| \d+\.\d \| \d\.\d{{3}} \|$", priors, re.MULTILINE)


def test_your_own_experts_runs_from_a_clean_kernel(tmp_path):
    notebook = _execute(_read("your_own_experts"), tmp_path)
    assert {cell: len(shown) for cell, shown in _shown(notebook, "image/png").items()} == {"figure": 1}
    printed = {
        cell.id: "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in _code(notebook)
    }
    assert "The experts are related" in printed["inspect"]
    rows = re.findall(r"^\| \**([a-z ]+\d?)\** \| ([\d.]+) ", printed["learn"], re.MULTILINE)
    values = {name: float(value) for name, value in rows}
    assert values["learned"] < values["uniform average"] < min(values[f"expert {number}"] for number in range(5))


def test_the_paper_runs_from_a_clean_kernel_and_shows_committed_runs_and_the_users(tmp_path):
    committed = {
        path.parent.name: json.loads(path.read_text()) for path in (ROOT / "experiments/results").glob("*/results.json")
    }
    titles = [results["title"] for results in committed.values() if "runs" in results]
    assert "digits, preset quick" in titles
    mine = tmp_path / "runs" / "mine"
    shutil.copytree(ROOT / "experiments/results/digits", mine)
    (mine / "results.json").write_text(json.dumps({**committed["digits"], "title": "a run of mine"}))
    page = tmp_path / "runs" / "variance-mine"
    page.mkdir()
    shutil.copy(mine / "alpha.png", page / "variance.png")
    (page / "results.json").write_text(json.dumps({"title": "an analysis of mine"}))
    (page / "report.md").write_text("# an analysis of mine\n\n![a picture](variance.png)\n\nits end\n")

    notebook = _read("paper")
    (cell,) = [cell for cell in notebook.cells if cell.id == "run-experiment"]
    assert cell.source.count('RUNS = Path("runs")') == 1
    cell.source = cell.source.replace('Path("runs")', f"Path({str(tmp_path / 'runs')!r})")
    _execute(notebook, tmp_path / "ipython")

    texts, pictures = _shown(notebook, "text/markdown"), _shown(notebook, "image/png")
    assert list(texts) == ["runs", "leads", "table1", "claims", "alpha", "pages"]
    for title in (*titles, "a run of mine"):
        for cell in ("runs", "claims", "alpha"):
            assert title in "\n".join(texts[cell]), (cell, title)
    assert "an analysis of mine" not in "\n".join(texts["runs"])
    assert texts["pages"][-2:] == ["# an analysis of mine\n\n", "\n\nits end\n"]
    assert list(pictures) == ["figure1", "alpha", "pages"]
    assert len(pictures["figure1"]) == -(-(len(titles) + 1) // 3)
    assert len(pictures["alpha"]) == len(titles) + 1


@pytest.fixture
def run_experiment(tmp_path, monkeypatch):
    """Runs the paper's notebook's cell that runs an experiment, with a script in the place of Python."""
    (cell,) = [cell for cell in _read("paper").cells if cell.id == "run-experiment"]
    assert cell.source.count("EXPERIMENT = None") == 1

    def run(script):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        source = cell.source.replace("EXPERIMENT = None", 'EXPERIMENT = "svhn"')
        exec(source, {"Path": pathlib.Path, "subprocess": subprocess, "sys": sys})

    return run


def test_what_an_experiment_prints_is_shown_in_its_cell(run_experiment, capsys):
    run_experiment('echo "$@"; echo a warning >&2')
    assert capsys.readouterr().out.splitlines() == [
        "-u -m pip install --quiet -e .[experiments,prepare,cuda12]",
        "a warning",
        "-u -m experiments.svhn --out-dir runs/svhn --data-dir runs/tensorflow_datasets",
        "a warning",
    ]


def test_an_experiment_that_fails_says_how_it_ended(run_experiment, capsys):
    with pytest.raises(RuntimeError, match=r"experiments.svhn .* ended with 3:\nline 11\n(line \d\d\n)+line 30\n$"):
        run_experiment('case "$3" in experiments*) for i in $(seq 30); do echo line $i; done; exit 3;; esac')
    assert capsys.readouterr().out.startswith("line 1\n")


def test_the_notebooks_are_these():
    assert [path.stem for path in FILES] == ["paper", "quickstart", "your_own_experts"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_outputs(path):
    notebook = _read(path.stem)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in _code(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing(path):
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in _code(_read(path.stem)):
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, definitions)], cell.id


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_names_the_one_public_address(path):
    title, install = _read(path.stem).cells[:2]
    public = ADDRESS.removeprefix("https://github.com/")
    colab = "https://colab.research.google.com"
    badge = f"{colab}/assets/colab-badge.svg)]({colab}/github/{public}/blob/main/notebooks/{path.name})"
    assert f"[![Open in Colab]({badge}" in title.source
    assert f'REPOSITORY = "{ADDRESS}"' in install.source
    assert set(re.findall(r"github(?:\.com)?/([^/\s)]+/glue_jax)", path.read_text())) == {public}


def test_the_notebooks_install_alike():
    cells = [_read(path.stem).cells[1] for path in FILES]
    assert {cell.id for cell in cells} == {"install"}
    assert len({cell.source for cell in cells}) == 1


@pytest.fixture
def install(monkeypatch):
    """Runs the notebooks' first cell in a folder, its commands recorded and not run; returns them."""
    source = _read("quickstart").cells[1].source

    def run_in(folder):
        commands = []

        def record(command, *, check):
            assert check
            commands.append(([str(word) for word in command], pathlib.Path.cwd()))
            if "clone" in command:
                (folder / "glue_jax" / "experiments").mkdir(parents=True)
                (folder / "glue_jax" / "experiments" / "digits.py").touch()

        monkeypatch.setattr(subprocess, "run", record)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.chdir(folder)
        exec(source, {})
        return commands

    return run_in


def test_nothing_is_installed_where_the_package_is_and_the_notebook_finds_the_root(install):
    assert install(ROOT / "notebooks") == []
    assert pathlib.Path.cwd() == ROOT
    assert sys.path[0] == str(ROOT)


def test_elsewhere_an_installed_clone_is_found(install, tmp_path):
    assert install(tmp_path) == []
    assert pathlib.Path.cwd() == ROOT


def test_on_a_bare_machine_the_clone_is_made_installed_and_entered_and_found_after_a_restart(
    install, tmp_path, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "distributions", list)
    clone = tmp_path / "glue_jax"
    pip = ([sys.executable, "-m", "pip", "install", "--quiet", "-e", ".[experiments]"], clone)
    assert install(tmp_path) == [(["git", "clone", "--depth", "1", ADDRESS, str(clone)], tmp_path), pip]
    assert pathlib.Path.cwd() == clone
    assert install(tmp_path) == [pip]
