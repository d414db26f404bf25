"""Coefficients by groups of paths."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import glue_jax
from experiments import models
from glue_jax.merging import by_layer, group_by_path
from glue_jax.paths import by_path

MODEL = {
    "params": {"blocks": [{"w": 0.0, "b": 0.0}, {"w": 0.0}], "head": {"w": 0.0}, "stem": 0.0},
    "batch_stats": {"blocks": [{"mean": 0.0}, {"mean": 0.0}]},
}


def test_a_block_has_its_parameters_and_its_statistics():
    groups = group_by_path(MODEL, r"blocks/\d+")
    assert groups.names == ("blocks/0", "blocks/1", "rest")
    assert groups.rows == {
        "params": {"blocks": [{"w": 0, "b": 0}, {"w": 1}], "head": {"w": 2}, "stem": 2},
        "batch_stats": {"blocks": [{"mean": 0}, {"mean": 1}]},
    }


def test_a_group_is_the_first_capture_group_where_there_is_one():
    assert group_by_path(MODEL, "(blocks|head)/").names == ("blocks", "head", "rest")
    assert group_by_path(MODEL, "^params/([a-z]+)").names == ("rest", "blocks", "head", "stem")


def test_a_function_may_name_the_groups():
    groups = group_by_path(MODEL, lambda path: path.rpartition("/")[2])
    assert groups.names == ("mean", "b", "w", "stem")


def test_a_pattern_in_no_path_is_refused_with_the_paths():
    with pytest.raises(ValueError, match="the pattern 'tail' matches no path; the paths are"):
        group_by_path(MODEL, "tail")


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("(blocks)/|(head)", ValueError, "is in params/head/w, but its first capture group matches nothing there"),
        ("x*", ValueError, "is in batch_stats/blocks/0/mean, but it matches nothing there"),
        (lambda path: path.partition(".")[2], ValueError, "the group of batch_stats/blocks/0/mean is an empty string"),
        (lambda path: None, TypeError, "the group of batch_stats/blocks/0/mean is None; expected a string"),
        (lambda path: ("a", path), TypeError, "expected a string"),
    ],
)
def test_a_group_without_a_name_is_refused_by_its_leaf(pattern, error, message):
    with pytest.raises(error, match=message):
        group_by_path(MODEL, pattern)


@pytest.mark.parametrize("tree", [{}, None, {"a": []}])
def test_experts_without_leaves_have_no_groups(tree):
    for function in (lambda: group_by_path(tree, "w"), lambda: group_by_path(tree, str)):
        with pytest.raises(ValueError, match=r"the experts hold no arrays"):
            function()


def named(tree, groups):
    """The group of each leaf by the leaf's path."""
    rows = jax.tree.leaves(groups.rows)
    return {path: groups.names[row] for path, row in zip(by_path(tree), rows, strict=True)}


def test_layers_of_flat_names_are_what_comes_before_the_last_dot():
    names = ["conv1.weight", "bn1.weight", "bn1.running_mean", "layer1.0.bn.bias", "layer1.0.bn.running_var", "fc.bias"]
    found = named(tree := dict.fromkeys(names, 0.0), by_layer(tree))
    assert found == {name: name.rpartition(".")[0] for name in names}
    together = named(tree, by_layer(tree, norms="bn"))
    assert together == {name: "norms" if "bn" in name else layer for name, layer in found.items()}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)


def test_layers_of_an_nnx_state_are_its_modules():
    state = nnx.state(Net(nnx.Rngs(0)))
    assert by_layer(state).names == ("dense", "norm")
    # Parameters and statistics apart, and as dicts.
    parts = nnx.split(Net(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)[1:]
    assert by_layer(parts, collections=r"^\d+/").names == ("dense", "norm")
    assert by_layer(tuple(map(nnx.to_pure_dict, parts)), collections=r"^\d+/").names == ("dense", "norm")
    stacked = glue_jax.stack_experts([state, state])
    rows = by_layer(stacked, norms="norm").rows
    blended = glue_jax.blend(stacked, jnp.eye(2), groups=rows)
    assert jax.tree.structure(blended) == jax.tree.structure(state)


def test_the_layers_of_a_flax_network_are_its_modules():
    network = models.build("convnet", image_shape=(8, 8, 3), num_classes=4)
    variables = jax.eval_shape(network.init, jax.random.key(0))
    assert by_layer(variables).names == ("norm1", "norm2", "conv1", "conv2", "head")
    assert by_layer(variables, norms="norm").names == ("norms", "conv1", "conv2", "head")


@pytest.mark.parametrize(
    ("name", "options", "shape", "count", "without_norms", "some"),
    [
        # Nine blocks of two convolutions and two norms; a convolution, a norm and a head beside them.
        ("resnet20", {}, (32, 32, 3), 39, 21, {"blocks/0/conv1", "blocks/8/conv2", "head"}),
        # 17 blocks: three convolutions and norms each, the first without its expansion; two more of each, and a head.
        ("mobilenetv2", {}, (32, 32, 3), 105, 54, {"blocks/16/depthwise", "head"}),
        # Two blocks of six dense layers and two norms; patches, a norm, a head, and the positions beside them.
        ("vit", {"depth": 2}, (48, 48, 3), 20, 16, {"blocks/0/attention/key", "patches", "rest"}),
    ],
)
def test_the_layers_of_deep_networks_are_their_modules(name, options, shape, count, without_norms, some):
    variables = jax.eval_shape(models.build(name, image_shape=shape, num_classes=10, **options).init, jax.random.key(0))
    plain, together = by_layer(variables).names, by_layer(variables, norms="norm").names
    assert (len(plain), len(together)) == (count, without_norms)
    assert some <= set(plain)
    assert "norms" in together


def test_paths_without_layers_and_norms_in_no_layer_are_refused():
    with pytest.raises(ValueError, match=r"no path names a layer; .* the paths are \['b1', 'w1'\]"):
        by_layer({"w1": 0.0, "b1": 0.0})
    with pytest.raises(ValueError, match=r"norms is 'bn', which matches no layer; .*'blocks/0'"):
        by_layer(MODEL, norms="bn")
