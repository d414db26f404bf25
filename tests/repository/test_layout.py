"""Imports run one way, and modules are small."""

import ast

import pytest

from tests.helpers import ROOT

MODULES = [path for package in ("glue_jax", "experiments") for path in sorted((ROOT / package).rglob("*.py"))]
# From the bottom up: each may import from itself and from those before it. Commands are all other modules.
ORDER = ("glue_jax", "models", "runtime", "protocol", "reporting", "studies", "commands")
_LONGEST = 350


def level(module):
    """The place of a module in the order; modules of other projects are below all of ours."""
    package, _, rest = module.partition(".")
    if package not in ("glue_jax", "experiments"):
        return -1
    part = package if package == "glue_jax" else rest.partition(".")[0]
    return ORDER.index(part if part in ORDER else "commands")


def imported(path):
    """The modules that a file imports; of `from experiments import models` the module `experiments.models`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test does not follow"
            assert node.module is not None
            names = [alias.name for alias in node.names] if node.module == "experiments" else [""]
            yield from (f"{node.module}.{name}" for name in names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_small_and_imports_what_is_below_it(path):
    assert len(path.read_text().splitlines()) <= _LONGEST
    own = level(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert [name for name in imported(path) if level(name) > own] == []
