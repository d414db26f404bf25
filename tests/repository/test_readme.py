import re
import tomllib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_library_examples_run_as_they_stand():
    namespace = {}
    first, second, _ = EXAMPLES
    for example in (first, second):
        exec(example, namespace)
    errors = [float(namespace["error_fn"](model, namespace["validation"])) for model in namespace["experts"]]
    found, average = (namespace["error_fn"](namespace[name], namespace["validation"]) for name in ("prior", "average"))
    numbers = r"error rate is (.*), the uniform average's (.*), the experts' (.*), (.*) and (.*)\."
    shown = re.search(numbers, EXAMPLES[0])
    assert shown is not None
    np.testing.assert_allclose([float(text) for text in shown.groups()], [found, average, *errors], atol=6e-4)
    assert found < min(average, *errors)
    assert namespace["metrics"].probe_losses.shape == (1, 2)


class _Network(nn.Module):
    """README's, with its running statistics."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(32)(x))
        return nn.Dense(4)(nn.relu(x))


def _labels(variables, x):
    return np.asarray(_Network().apply(variables, x)).argmax(axis=1)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_whole_way_to_a_stronger_prior_runs_with_a_flax_network(aligned):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (768, 8))
    truth = _Network().init(keys[1], x)
    leaves, treedef = jax.tree.flatten(truth)
    experts = []
    for row in jax.random.split(keys[2], (3, len(leaves))):
        noise = [jax.random.normal(k, leaf.shape) for k, leaf in zip(row, leaves, strict=True)]
        experts.append(jax.tree.map(jnp.add, truth, jax.tree.unflatten(treedef, noise)))
    data = {"x": x, "y": _labels(truth, x)}
    target = jax.tree.map(lambda leaf: leaf[:512], data)
    validation = jax.tree.map(lambda leaf: leaf[512:], data)
    namespace = {"experts": glue_jax.stack_experts(experts), "target": target, "validation": validation}
    example = re.sub(r"^# (?=spec =|experts =)", "", EXAMPLES[2], flags=re.MULTILINE) if aligned else EXAMPLES[2]
    exec(example, namespace)
    assert ("spec" in namespace) == aligned
    prior, coarse, fine = (namespace[name] for name in ("prior", "coarse", "fine"))
    assert set(namespace["groups"].names) == {"norms", "Dense_0", "Dense_1"}
    first, *others = fine.alpha
    assert all(jnp.abs(first - other).max() > 1e-3 for other in others)
    assert fine.history.validation_values.min() < coarse.history.validation_values.min()
    # Its own statistics, on all target data, serve a network in evaluation mode.
    hidden = np.asarray(nn.Dense(32).apply({"params": prior["params"]["Dense_0"]}, target["x"]))
    statistics = prior["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], hidden.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(statistics["var"], hidden.var(axis=0), rtol=1e-4)
    assert namespace["logits"].shape == (256, 4)
    np.testing.assert_array_equal(namespace["logits"].argmax(axis=1), _labels(prior, validation["x"]))
    correct = [_labels(variables, validation["x"]) == validation["y"] for variables in (prior, *experts)]
    assert correct[0].mean() > max(each.mean() for each in correct[1:])


def test_the_test_command_is_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^(.* && \.venv/bin/python -m pytest)$", README, re.MULTILINE)
    for part in command.split(" && "):
        assert part in ci.replace("--quiet ", "")


def test_all_files_name_one_public_address():
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    for path in ("README.md", "CITATION.cff"):
        found = set(re.findall(r"https://github\.com/[^/\s)]+/glue_jax", (ROOT / path).read_text()))
        assert found == {address}, path


def test_every_picture_and_report_that_is_shown_is_there():
    shown = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert [path for path in shown if path.endswith(".png")]
    assert "RESULTS_" not in README
    assert not [path for path in shown if not (ROOT / path).exists()]
