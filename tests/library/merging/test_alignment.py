"""Permutation alignment: the function stays, and a permuted expert is found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from experiments import models
from experiments.models.permutations import SPECS
from glue_jax.merging import align, align_experts, chain_spec, permute
from tests.experiments.helpers import small_mobilenetv2

MLP = {
    "dense1/kernel": (None, "hidden1"),
    "dense1/bias": ("hidden1",),
    "dense2/kernel": ("hidden1", "hidden2"),
    "dense2/bias": ("hidden2",),
    "dense3/kernel": ("hidden2", None),
    "dense3/bias": (None,),
}
VIT = {"depth": 2, "width": 24, "heads": 3, "mlp_width": 32, "patch_size": 4, "pooling": "mean", "positions": "learned"}
NETWORKS = {
    "convnet": ("convnet", {}, (8, 8, 1)),
    "resnet20": ("resnet20", {}, (8, 8, 3)),
    "mobilenetv2": ("mobilenetv2", {}, (8, 8, 3)),
    "vit": ("vit", VIT, (8, 8, 3)),
    "vit, fixed positions, token": ("vit", {**VIT, "positions": "sincos", "pooling": "token"}, (8, 8, 3)),
}


def mlp(key):
    keys = jax.random.split(key, (3, 2))
    sizes = ((5, 7), (7, 6), (6, 3))
    return {
        f"dense{index}": {"kernel": jax.random.normal(k[0], shape), "bias": jax.random.normal(k[1], shape[1:])}
        for index, (k, shape) in enumerate(zip(keys, sizes, strict=True), 1)
    }


def mlp_logits(params, x):
    for name in ("dense1", "dense2"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["dense3"]["kernel"] + params["dense3"]["bias"][None]


def shuffled(spec, params, seed=0):
    """Random permutations of all that a spec names."""
    identity = align(params, params, spec)
    rng = np.random.default_rng(seed)
    drawn = {name: rng.permutation(len(permutation)) for name, permutation in identity.items()}
    # None stays as it is.
    return {name: np.roll(found, 1) if (found == identity[name]).all() else found for name, found in drawn.items()}


def assert_trees_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(params=NETWORKS, scope="module")
def network(request):
    """Network, variables whose leaves are all different, spec and images."""
    name, options, shape = NETWORKS[request.param]
    rng = np.random.default_rng(0)

    def draw(leaf):
        """Weights of the size that keeps the size of what they multiply; all else, as variances, is above 0."""
        if leaf.ndim > 1:
            drawn = rng.normal(size=leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])
        else:
            drawn = rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(drawn, leaf.dtype)

    with small_mobilenetv2():
        network = models.build(name, image_shape=shape, num_classes=4, **options)
        variables = jax.tree.map(draw, jax.eval_shape(network.init, jax.random.key(0)))
        images = jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)
        return network, variables, SPECS[name](**options), images


def test_a_permuted_network_computes_the_same(network):
    network, variables, spec, images = network
    moved = permute(variables, spec, shuffled(spec, variables))
    kernels = [path for path in spec if path.endswith("kernel")]
    by_path = dict(zip(jax.tree.leaves(glue_jax.paths.leaf_paths(moved)), jax.tree.leaves(moved), strict=True))
    before = dict(zip(by_path, jax.tree.leaves(variables), strict=True))
    assert all((np.asarray(by_path[path]) != before[path]).any() for path in kernels if any(spec[path]))
    logits = jax.jit(network.apply)
    np.testing.assert_allclose(logits(moved, images), logits(variables, images), rtol=1e-3, atol=1e-4)


def test_a_permuted_expert_is_aligned_back_exactly(network):
    _, variables, spec, _ = network
    moved = permute(variables, spec, shuffled(spec, variables))
    found = align(moved, variables, spec)
    assert_trees_equal(permute(moved, spec, found), variables)


@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_every_leaf_of_a_network_is_in_its_spec(name, options, shape):
    # Positions that are fixed hold the stream in its place; they are no leaf.
    network = models.build(name, image_shape=shape, num_classes=4, **options)
    variables = jax.eval_shape(network.init, jax.random.key(0))
    assert set(SPECS[name](**options)) == set(jax.tree.leaves(glue_jax.paths.leaf_paths(variables)))


def test_a_permutation_takes_each_unit_from_its_place():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(3.0)}
    moved = permute(params, {"a": (None, "unit"), "b": ("unit",)}, {"unit": np.array([2, 0, 1])})
    np.testing.assert_array_equal(moved["a"], [[2, 0, 1], [5, 3, 4]])
    np.testing.assert_array_equal(moved["b"], [2, 0, 1])


def test_segments_move_the_units_of_each_permutation_among_its_own_places():
    # Units 0 and 1 of "outer" lie on either side of "inner".
    spec = {"a": ((("outer", 0, 1), ("inner", 0, 2), ("outer", 1, 2)),), "b": ("inner",)}
    params = {"a": jnp.array([10.0, 20.0, 21.0, 11.0]), "b": jnp.array([20.0, 21.0])}
    swapped = {"inner": np.array([1, 0]), "outer": np.array([1, 0])}
    moved = permute(params, spec, swapped)
    np.testing.assert_array_equal(moved["a"], [11, 21, 20, 10])
    np.testing.assert_array_equal(moved["b"], [21, 20])
    np.testing.assert_array_equal(permute(params, spec, {"outer": np.array([1, 0])})["a"], [11, 20, 21, 10])


def test_experts_aligned_to_one_of_them_differ_as_they_did_before_they_were_permuted():
    base = mlp(jax.random.key(3))
    noise = [jax.tree.map(lambda leaf: 0.01 * leaf, mlp(jax.random.key(4 + index))) for index in range(3)]
    originals = [jax.tree.map(jnp.add, base, tree) for tree in noise]
    moved = [
        permute(expert, MLP, shuffled(MLP, base, index)) if index else expert for index, expert in enumerate(originals)
    ]
    found = align_experts(glue_jax.stack_experts(moved), MLP)
    jax.tree.map(np.testing.assert_allclose, found.experts, glue_jax.stack_experts(originals))
    for index, expert in enumerate(moved):
        assert_trees_equal(
            permute(expert, MLP, found.permutations[index]),
            jax.tree.map(lambda leaf, index=index: leaf[index], found.experts),
        )


def test_joint_alignment_brings_permuted_copies_of_one_expert_together():
    base = mlp(jax.random.key(5))
    experts = glue_jax.stack_experts([permute(base, MLP, shuffled(MLP, base, index)) for index in range(4)])
    found = align_experts(experts, MLP, reference=None)
    average = glue_jax.blend(found.experts, glue_jax.coefficients.uniform(4))
    x = jax.random.normal(jax.random.key(6), (10, 5))
    np.testing.assert_allclose(mlp_logits(average, x), mlp_logits(base, x), rtol=1e-3, atol=1e-4)
    # Before, their average is another function.
    before = mlp_logits(glue_jax.blend(experts, glue_jax.coefficients.uniform(4)), x)
    assert np.abs(before - mlp_logits(base, x)).max() > 0.1


def test_an_expert_is_never_further_from_the_reference_than_before():
    first, second = mlp(jax.random.key(7)), mlp(jax.random.key(8))

    def distance(params):
        return sum(
            float(jnp.sum(jnp.square(a - b))) for a, b in zip(*map(jax.tree.leaves, (params, first)), strict=True)
        )

    aligned = permute(second, MLP, align(second, first, MLP))
    assert distance(aligned) < distance(second)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"dense9/kernel": (None, "hidden1")}, "spec names 'dense9/kernel', but the model has no such leaf"),
        ({"dense1/kernel": ("hidden1",)}, r"spec has 1 axes for dense1/kernel; expected 2, \(5, 7\)"),
        (
            {"dense1/kernel": (None, "hidden1"), "dense3/kernel": ("hidden1", None)},
            "'hidden1' has 6 units at dense3/kernel, but 7 elsewhere",
        ),
        ({"dense1/bias": ((("hidden1", 0, 3),),)}, "for dense1/bias; expected segments that fill an axis of 7 units"),
        ({"dense1/bias": ((("hidden1", 1, 8),),)}, "expected each unit of 'hidden1' exactly once"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(spec, message):
    params = mlp(jax.random.key(9))
    with pytest.raises(ValueError, match=message):
        align(params, params, spec)


def test_a_reference_that_is_no_experts_number_is_refused():
    experts = glue_jax.stack_experts([mlp(jax.random.key(10))] * 2)
    with pytest.raises(ValueError, match="reference is 2; expected the index of one of 2 experts, or None"):
        align_experts(experts, MLP, reference=2)


@pytest.mark.parametrize(
    ("permutations", "message"),
    [
        ({"hidden1": [0, 0, 1, 2, 3, 4, 5]}, "expected each of the integers 0 to 6 once"),
        ({"hidden1": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}, "expected each of the integers 0 to 6 once"),
        ({"hidden1": [1, 0]}, "expected each of the integers 0 to 6 once"),
        ({"hidden3": [0]}, r"permutations has 'hidden3'; expected names of the spec, \['hidden1', 'hidden2'\]"),
    ],
)
def test_what_is_no_permutation_of_the_spec_is_refused(permutations, message):
    with pytest.raises(ValueError, match=message):
        permute(mlp(jax.random.key(0)), MLP, {name: np.array(found) for name, found in permutations.items()})


def test_a_reference_of_other_leaves_or_shapes_is_refused():
    model = mlp(jax.random.key(0))
    with pytest.raises(ValueError, match="params has no leaf at 'dense3/"):
        align({name: model[name] for name in ("dense1", "dense2")}, model, MLP)
    smaller = {**model, "dense1": {"kernel": jnp.zeros((4, 7)), "bias": jnp.zeros(7)}}
    with pytest.raises(ValueError, match=r"params has \(4, 7\) at 'dense1/kernel', and reference has \(5, 7\)"):
        align(smaller, model, MLP)


def test_the_spec_of_a_chain_is_the_one_written_by_hand():
    def renamed(spec, names):
        return {path: tuple(names.get(axis, axis) for axis in axes) for path, axes in spec.items()}

    found = chain_spec(mlp(jax.random.key(0)), ["dense1", "dense2", "dense3"])
    assert renamed(found, {"units0": "hidden1", "units1": "hidden2"}) == MLP
    variables = jax.eval_shape(models.build("convnet", image_shape=(8, 8, 1), num_classes=4).init, jax.random.key(0))
    found = chain_spec(variables, ["(conv|norm)1/", "(conv|norm)2/", "head"])
    assert renamed(found, {"units0": "conv1", "units1": "conv2"}) == SPECS["convnet"]()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["dense1", "dense4"], "the pattern 'dense4' matches no path"),
        (["dense1", "dense"], "matches 'dense1/bias', which an earlier layer matches too"),
        (["dense"], r"layers is \['dense'\]; expected at least two"),
        (["dense1", "dense3"], "the layers are no chain .*'in_out', permutation 'units0' has 6 units at dense3/kernel"),
    ],
)
def test_layers_that_are_no_chain_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        chain_spec(mlp(jax.random.key(0)), layers)


def test_experts_that_are_stacked_and_a_single_pattern_are_no_layers():
    model = mlp(jax.random.key(0))
    stacked = glue_jax.stack_experts([model, model])
    with pytest.raises(ValueError, match=r"no chain of one model \(stacked experts are several models\)"):
        chain_spec(stacked, ["dense1", "dense2", "dense3"])
    with pytest.raises(TypeError, match="layers is the string 'dense1'; expected a sequence of patterns"):
        chain_spec(model, "dense1")
    with pytest.raises(ValueError, match="kernel_layout is 'oi'; expected one of"):
        chain_spec(model, ["dense1", "dense2"], kernel_layout="oi")  # pyright: ignore[reportArgumentType]


def torch_mlp(key, sizes):
    """As a state dict of PyTorch: kernels `[out, in]`, keys with dots."""
    pairs = list(zip(sizes[1:], sizes, strict=False))
    kernels = {f"{index}.weight": shape for index, shape in enumerate(pairs)}
    shapes = {**kernels, **{f"{index}.bias": shape[:1] for index, shape in enumerate(pairs)}}
    keys = jax.random.split(key, len(shapes))
    return {path: jax.random.normal(k, shape) for k, (path, shape) in zip(keys, shapes.items(), strict=True)}


def torch_logits(params, x):
    for index in range(3):
        x = x @ params[f"{index}.weight"].T + params[f"{index}.bias"][None]
        x = jnp.tanh(x) if index < 2 else x
    return x


LAYERS = [r"^0\.", r"^1\.", r"^2\."]


@pytest.mark.parametrize(("sizes", "layout"), [((5, 7, 6, 3), None), ((6, 6, 6, 6), "out_in")])
def test_kernels_with_outputs_first_compute_the_same_when_they_are_aligned(sizes, layout):
    models = [torch_mlp(jax.random.key(seed), sizes) for seed in range(2)]
    x = jax.random.normal(jax.random.key(2), (4, sizes[0]))
    spec = chain_spec(models[0], LAYERS, kernel_layout=layout)
    found = align_experts(glue_jax.stack_experts(models), spec, check_fn=lambda params: torch_logits(params, x))
    assert (found.permutations[1]["units0"] != np.arange(sizes[1])).any()
    moved = jax.tree.map(lambda leaf: leaf[1], found.experts)
    np.testing.assert_allclose(torch_logits(moved, x), torch_logits(models[1], x), rtol=1e-4, atol=1e-4)


def test_a_layout_that_the_shapes_do_not_tell_or_that_they_contradict_is_refused():
    square = torch_mlp(jax.random.key(0), (6, 6, 6, 6))
    with pytest.raises(ValueError, match="the shapes fit both layouts of kernels: pass kernel_layout='in_out'"):
        chain_spec(square, LAYERS)
    with pytest.raises(ValueError, match=r"with kernel_layout 'in_out', permutation 'units0' has 5 units at 0.weight"):
        chain_spec(torch_mlp(jax.random.key(0), (5, 7, 6, 3)), LAYERS, kernel_layout="in_out")


def test_convolutions_with_outputs_first_have_biases_and_counters_of_their_own_shapes():
    # Biases of Equinox are [out, 1, 1]; PyTorch counts batches in a scalar.
    params = {
        "conv1": {"weight": jnp.zeros((4, 3, 3, 3)), "bias": jnp.zeros((4, 1, 1)), "count": jnp.array(7)},
        "conv2": {"weight": jnp.zeros((2, 4, 3, 3)), "bias": jnp.zeros((2, 1, 1))},
    }
    assert chain_spec(params, ["conv1", "conv2"]) == {
        "conv1/bias": ("units0", None, None),
        "conv1/count": (),
        "conv1/weight": ("units0", None, None, None),
        "conv2/bias": (None, None, None),
        "conv2/weight": (None, "units0", None, None),
    }


def test_a_spec_that_changes_what_an_expert_computes_is_found_by_its_function():
    models = [torch_mlp(jax.random.key(seed), (6, 6, 6, 6)) for seed in range(2)]
    x = jax.random.normal(jax.random.key(2), (4, 6))
    wrong = chain_spec(models[0], LAYERS, kernel_layout="in_out")
    with pytest.raises(ValueError, match="expert 1 computes something else after its units changed places"):
        align_experts(
            glue_jax.stack_experts(models), wrong, check_fn=lambda params: {"logits": torch_logits(params, x)}
        )


def test_weights_that_are_no_numbers_are_named_by_expert_and_path():
    good = mlp(jax.random.key(0))
    for value in (jnp.nan, -jnp.inf):
        bad = {**good, "dense2": {**good["dense2"], "bias": good["dense2"]["bias"].at[3].set(value)}}
        with pytest.raises(ValueError, match=f"expert 1 of experts holds {value} at dense2/bias; expected finite"):
            align_experts(glue_jax.stack_experts([good, bad]), MLP)
        for name, pair in (("params", (bad, good)), ("reference", (good, bad))):
            with pytest.raises(ValueError, match=f"{name} holds {value} at dense2/bias"):
                align(*pair, MLP)


def test_two_leaves_of_one_path_are_refused():
    tree = {"a/b": jnp.arange(4.0), "a": {"b": jnp.arange(4.0)}, "c": jnp.ones((4, 2))}
    for function in (
        lambda: permute(tree, {}, {}),
        lambda: align(tree, tree, {"c": ("unit", None)}),
        lambda: chain_spec(tree, ["a", "c"]),
    ):
        with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
            function()


def test_nothing_to_compare_and_no_rounds_are_refused():
    model = mlp(jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"ignore is '.'; expected a pattern that leaves weights to match .*'hidden1', 'hidden2'"
    ):
        align(model, model, MLP, ignore=".")
    with pytest.raises(ValueError, match="max_sweeps is 0; expected at least 1"):
        align(model, model, MLP, max_sweeps=0)
    with pytest.raises(ValueError, match="max_rounds is -1; expected at least 1"):
        align_experts(glue_jax.stack_experts([model, model]), MLP, reference=None, max_rounds=-1)


def test_experts_of_half_precision_keep_it_and_their_counters():
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mlp(jax.random.key(5)))
    moved = permute(base, MLP, shuffled(MLP, base, 1))
    experts = {**jax.tree.map(lambda *leaves: jnp.stack(leaves), base, moved), "seen": np.array([2**40, 2**40 + 7])}
    for reference in (0, None):
        found = align_experts(experts, MLP, reference=reference).experts
        assert found["dense1"]["kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found["seen"], experts["seen"])
        np.testing.assert_array_equal(found["dense2"]["kernel"][1], found["dense2"]["kernel"][0])


def test_experts_whose_heads_differ_share_a_backbone_and_one_of_the_heads():
    base = mlp(jax.random.key(10))
    heads = [{"kernel": jnp.ones((6, classes)), "bias": jnp.zeros(classes)} for classes in (3, 5)]
    moved = {**permute(base, MLP, shuffled(MLP, base)), "dense3": heads[1]}
    parts, rests = zip(*(glue_jax.partition(expert, "^dense3/") for expert in (base, moved)), strict=True)
    backbone = {path: axes for path, axes in MLP.items() if not path.startswith("dense3/")}
    aligned = align_experts(glue_jax.stack_experts(rests), backbone).experts
    model = glue_jax.combine(glue_jax.blend(aligned, glue_jax.coefficients.uniform(2)), parts[0])
    x = jax.random.normal(jax.random.key(11), (4, 5))
    np.testing.assert_allclose(mlp_logits(model, x), mlp_logits(base, x), rtol=1e-4, atol=1e-5)


def test_complex_weights_and_a_check_that_checks_nothing_are_refused():
    models = [mlp(jax.random.key(seed)) for seed in (20, 21)]
    with pytest.raises(TypeError, match=r"params or reference is complex at '.*'; expected real weights"):
        align(jax.tree.map(lambda leaf: leaf * 1j, models[0]), models[1], MLP)
    experts = glue_jax.stack_experts(models)
    with pytest.raises(ValueError, match="check_fn returned None; expected arrays"):
        align_experts(experts, MLP, check_fn=lambda params: None)
    with pytest.raises(TypeError, match=r"reference is 1.0; expected an integer"):
        align_experts(experts, MLP, reference=1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="permutations is a list; expected a mapping"):
        permute(models[0], MLP, [{}])  # pyright: ignore[reportArgumentType]
