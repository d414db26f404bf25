import pathlib
import re
import tomllib

import jax
import jax.numpy as jnp

import glue_jax

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_library_examples_run_as_they_stand():
    namespace = {}
    first, second, _ = EXAMPLES
    for example in (first, second):
        exec(example, namespace)
    assert namespace["prior"]["w"].shape == (3,)
    assert namespace["metrics"].probe_losses.shape == (1, 2)


def _network(variables, x):
    """Logits of a small network, normalised by the minibatch, and its statistics."""
    hidden = x @ variables["params"]["hidden"]["kernel"]
    mean, var = hidden.mean(axis=0, keepdims=True), hidden.var(axis=0, keepdims=True)
    hidden = jax.nn.relu((hidden - mean) * jax.lax.rsqrt(var + 1e-5))
    return hidden @ variables["params"]["head"]["kernel"], {"norm": {"mean": mean[0], "var": var[0]}}


def test_the_whole_way_to_a_stronger_prior_runs_with_a_network_of_the_readers():
    keys = jax.random.split(jax.random.key(0), 4)
    truth = {
        "params": {
            "hidden": {"kernel": jax.random.normal(keys[0], (8, 16))},
            "head": {"kernel": jax.random.normal(keys[1], (16, 4))},
        },
        "batch_stats": {"norm": {"mean": jnp.zeros(16), "var": jnp.ones(16)}},
    }
    leaves, treedef = jax.tree.flatten(truth)
    # One expert is near the truth, two are not.
    noise = [
        jax.tree.unflatten(
            treedef, [scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(row, leaves, strict=True)]
        )
        for scale, row in zip((0.2, 2, 2), jax.random.split(keys[2], (3, len(leaves))), strict=True)
    ]
    experts = glue_jax.stack_experts([jax.tree.map(jnp.add, truth, each) for each in noise])
    x = jax.random.normal(keys[3], (768, 8))
    data = {"x": x, "y": _network(truth, x)[0].argmax(axis=1)}
    namespace = {
        "K": 3,
        "experts": experts,
        "target": jax.tree.map(lambda leaf: leaf[:512], data),
        "validation": jax.tree.map(lambda leaf: leaf[512:], data),
        "minibatch_logits": lambda variables, x: _network(variables, x)[0],
        "minibatch_statistics": lambda variables, batch: _network(variables, batch["x"])[1],
    }
    exec(EXAMPLES[2], namespace)
    uniform = glue_jax.blend(experts, glue_jax.uniform(3))
    loss_fn, prior, validation = namespace["loss_fn"], namespace["prior"], namespace["validation"]
    assert loss_fn(prior, validation) < loss_fn(uniform, validation) - 0.1
    assert jax.tree.structure(prior) == jax.tree.structure(truth)


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
