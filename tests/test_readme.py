import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_library_examples_run_as_they_stand():
    namespace = {}
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, namespace)
    assert namespace["prior"]["w"].shape == (3,)
    assert namespace["metrics"].probe_losses.shape == (1, 2)


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^(.* && \.venv/bin/python -m pytest)$", README, re.MULTILINE)
    for part in command.split(" && "):
        assert part in ci.replace("--quiet ", "")


def test_the_public_address_is_that_of_the_project():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    for path in ("README.md", "CITATION.cff"):
        found = set(re.findall(r"https://github\.com/[^/\s)]+/glue_jax", (ROOT / path).read_text()))
        assert found == {address}, path


def test_every_picture_and_report_that_is_shown_is_there():
    shown = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert [path for path in shown if path.endswith(".png")]
    assert "RESULTS_" not in README
    assert not [path for path in shown if not (ROOT / path).exists()]
