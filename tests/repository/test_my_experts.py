"""The page 'Bring your own experts': each of its sections runs, as a reader runs it, in a folder of its own."""

import contextlib
import glob
import io
import re
import shlex
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from glue_jax.cli import main
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "my-experts.md").read_text()
SECTIONS = {part.splitlines()[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:] if "\n```" in part}
BLOCK = re.compile(r'^```(python|sh|text)(?: title="([^"\n]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
FOREIGN = ("torch", "torchax", "transformers", "equinox")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a section: writes its files, and runs its Python and its commands in turn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def run(title):
        blocks = BLOCK.findall(SECTIONS[title])
        code = "\n".join(text for language, _, text in blocks if language == "python")
        needed = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
        if "\ndef module():" in code:
            needed.add("torchax")
        for library in FOREIGN:
            if library in needed:
                pytest.importorskip(library, reason=f"{library} is not installed: pip install 'glue_jax[foreign]'")
        namespace = {"__name__": title}
        # A reader's JAX has its own settings, not those of the tests.
        with jax.numpy_rank_promotion("allow"), contextlib.redirect_stdout(io.StringIO()) as printed:
            for language, file, text in blocks:
                if language == "python" and file:
                    (tmp_path / file).write_text(text)
                elif language == "python":
                    exec(compile(text, f"{title}.py", "exec"), namespace)
                elif language == "sh":
                    for line in text.splitlines():
                        command, *words = shlex.split(line)
                        assert command == "glue-jax"
                        assert main([path for word in words for path in sorted(glob.glob(word)) or [word]]) == 0, line
        return namespace, printed.getvalue(), [text for language, _, text in blocks if language == "text"]

    yield run
    # The next section has files of the same names.
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def _without_numbers(text):
    return [re.sub(r"\s+", " ", re.sub(r"-?\d[\d.,]*\d|\d", "#", line)).strip() for line in text.splitlines() if line]


@pytest.mark.parametrize(
    "title", [title for title in SECTIONS if not title.startswith(("PyTorch", "LoRA", "A served", "The last"))]
)
def test_a_section_runs(run, title):
    run(title)


def test_the_shortest_way_prints_what_it_says_and_its_blend_is_better_than_each_expert(run):
    namespace, printed, shown = run("PyTorch: the shortest way")
    assert len(shown) == 2
    for text in shown:
        assert set(_without_numbers(text)) <= set(_without_numbers(printed))
    said = re.search(r"the blend has (\S+) %. The best expert has (\S+) %", SECTIONS["PyTorch: the shortest way"])
    assert said is not None
    measured = [100 * namespace["blended"], 100 * max(namespace["alone"])]
    np.testing.assert_allclose(measured, [float(figure) for figure in said.groups()], atol=3)


def test_the_written_adapter_is_the_sum_of_the_products(run):
    namespace, _, _ = run("LoRA adapters")
    a, b = (f"base_model.model.layer.lora_{factor}.weight" for factor in "AB")
    folders = [*(f"adapter{rank}" for rank in (1, 2, 3)), "mine"]
    *parts, blend = (load_file(f"{folder}/adapter_model.safetensors") for folder in folders)
    # Each of the three has the scaling 2.
    products = [2 * part[b] @ part[a] for part in parts]
    expected = np.tensordot(namespace["result"].alpha, products, axes=1)
    np.testing.assert_allclose(blend[b] @ blend[a], expected, atol=1e-5)


def test_the_metric_of_the_blend_is_at_most_that_of_the_average(run):
    _, printed, _ = run("A served model, or a metric")
    values = {name: float(value) for name, value in re.findall(r"^\| \**([\w ]+?)\** \| ([\d.e-]+) ", printed, re.M)}
    assert values["learned"] < values["uniform average"]


def test_the_blend_of_a_run_is_one_checkpoint_of_the_model(run):
    _, printed, _ = run("The last checkpoints of one run")
    assert "expert 2" in printed
    assert "expert 3" not in printed
