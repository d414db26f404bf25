"""What the tests of the experiments share: data, and the programs of equal configs."""

import ast
import functools
import types

import optax
import pytest

from experiments import models
from experiments.digits import PRESETS
from experiments.protocol import context, data
from experiments.protocol.training import Problem, make_evaluate, make_trainer
from experiments.runtime import sources
from experiments.runtime.stages import Stages
from tests.experiments.helpers import ONE_SEED


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture
def tiny(monkeypatch):
    """Makes the experiment that the studies are of by default a small one."""
    monkeypatch.setitem(PRESETS, "quick", ONE_SEED)


@pytest.fixture
def written(monkeypatch):
    """Lists the names of the stages that the test writes."""
    names, write = [], Stages.write
    monkeypatch.setattr(Stages, "write", lambda self, name, *rest: names.append(name) or write(self, name, *rest))
    return names


@pytest.fixture(scope="session", autouse=True)
def _programs_are_made_once():
    """Lets runs of equal configs share their networks, trainers and optimizers, which are traced and compiled once."""
    problems = {}

    def make_problem(network, mean, std, mesh):
        return problems.setdefault((network, mean.tobytes(), std.tobytes(), mesh), Problem(network, mean, std, mesh))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            context, "models", types.SimpleNamespace(MODULES=models.MODULES, build=functools.cache(models.build))
        )
        patch.setattr(context, "optax", types.SimpleNamespace(adam=functools.cache(optax.adam)))
        patch.setattr(context, "Problem", make_problem)
        patch.setattr(context, "make_trainer", functools.cache(make_trainer))
        patch.setattr(context, "make_evaluate", functools.cache(make_evaluate))
        yield


@pytest.fixture
def change_source(monkeypatch):
    """Changes a definition in the source that digests see. What was read of all others is kept."""
    definition, changed = sources._definition, {}
    monkeypatch.setattr(sources, "_definition", lambda name: changed.get(name) or definition(name))

    def change(module, name, before, after):
        parsed = sources._parse(module)
        (statement,) = parsed.definitions[name]
        text = ast.unparse(statement)
        assert before in text
        monkeypatch.setitem(parsed.definitions, name, ast.parse(text.replace(before, after)).body)
        changed[f"{module}:{name}"] = definition.__wrapped__(f"{module}:{name}")
        sources.digest.cache_clear()

    yield change
    sources.digest.cache_clear()
