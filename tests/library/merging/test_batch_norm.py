"""BatchNorm statistics of a blend, estimated anew."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import glue_jax
from experiments import models
from experiments.protocol.data import Examples
from glue_jax.merging import refresh_statistics


def statistics(params, batch):
    """Of one layer whose input is the batch times a parameter."""
    x = batch * params["params"]["scale"]
    return {"norm": {"mean": jnp.mean(x, axis=0), "var": jnp.var(x, axis=0)}}


DATA = jax.random.normal(jax.random.key(0), (50, 3)) * jnp.array([[1.0, 2.0, 3.0]]) + jnp.array([[0.0, 5.0, -100.0]])
PARAMS = {"params": {"scale": jnp.array(2.0)}, "batch_stats": {"norm": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}


@pytest.mark.parametrize("cuts", [[], [25], [1, 3, 40]], ids=["one batch", "equal batches", "unequal batches"])
def test_statistics_of_batches_are_those_of_all_examples(cuts):
    refreshed = refresh_statistics(PARAMS, np.split(np.asarray(DATA), cuts), statistics)
    norm = refreshed["batch_stats"]["norm"]
    np.testing.assert_allclose(norm["mean"], 2 * DATA.mean(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm["var"], 4 * DATA.var(axis=0), rtol=1e-4)
    assert refreshed["params"] is PARAMS["params"] or refreshed["params"] == PARAMS["params"]


def test_what_statistics_held_before_makes_no_difference():
    _, without = glue_jax.partition(PARAMS, "^batch_stats/")
    first, second = (refresh_statistics(params, [DATA], statistics) for params in (PARAMS, without))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_flax_nnx_networks_statistics_are_its_minibatchs():
    network = models.build("convnet", image_shape=(8, 8, 1), num_classes=4)
    variables = network.init(jax.random.key(1))
    images = 3 + 2 * jax.random.normal(jax.random.key(2), (32, 8, 8, 1))

    def statistics_fn(variables, batch):
        return network.apply_minibatch(variables["params"], batch)[1]

    logits, _ = network.apply_minibatch(variables["params"], images)
    refreshed = refresh_statistics(variables, [images], jax.jit(statistics_fn))
    # In evaluation mode with the statistics of a batch, the network does to it what it does in training mode.
    np.testing.assert_allclose(network.apply(refreshed, images), logits, rtol=1e-4, atol=1e-4)
    assert np.abs(network.apply(variables, images) - logits).max() > 0.1
    # The network's own update of running statistics, of momentum 0.9, goes a tenth of the way.
    _, updated = network.apply_training(variables, images)
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, variables["batch_stats"], refreshed["batch_stats"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), updated, expected)


@pytest.mark.parametrize("pure", [True, False], ids=["pure dict", "nnx.State"])
def test_statistics_among_the_parameters_of_an_nnx_model_are_found_by_their_paths(pure):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, momentum=0.0, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    convert = nnx.to_pure_dict if pure else lambda state: state

    def statistics_fn(params, batch):
        module = nnx.merge(graph, params)
        module(batch)
        return convert(nnx.state(module, nnx.BatchStat))

    refreshed = refresh_statistics(convert(state), [DATA[:20], DATA[20:]], statistics_fn, collection="")
    assert jax.tree.structure(refreshed) == jax.tree.structure(convert(state))
    models = (nnx.merge(graph, tree) for tree in (refreshed, convert(state)))
    found, before = (nnx.to_pure_dict(nnx.state(model)) for model in models)
    whole = DATA @ before["dense"]["kernel"] + before["dense"]["bias"][None]
    np.testing.assert_allclose(found["norm"]["mean"], whole.mean(axis=0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["norm"]["var"], whole.var(axis=0), rtol=1e-4)
    np.testing.assert_array_equal(found["norm"]["scale"], before["norm"]["scale"])


def test_statistics_of_low_precision_are_pooled_in_float32():
    def low(params, batch):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), statistics(params, batch))

    norm = refresh_statistics(PARAMS, [DATA] * 300, low)["batch_stats"]["norm"]
    assert norm["mean"].dtype == norm["var"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, norm, low(PARAMS, DATA)["norm"])


def test_what_does_not_fit_is_refused_with_the_first_batch():
    def batches():
        yield DATA
        pytest.fail("a second batch was asked for")

    with pytest.raises(ValueError, match="params has no place for"):
        refresh_statistics({"params": PARAMS["params"]}, batches(), statistics)


def test_batches_of_other_statistics_are_refused():
    found = iter([{"a": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}, {"b": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}])
    params = {"batch_stats": {"a": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}
    with pytest.raises(ValueError, match=r"returned \['b/mean', 'b/var'\] for one batch and \['a/mean', 'a/var'\]"):
        refresh_statistics(params, [DATA, DATA], lambda params, batch: next(found))


def test_evaluation_without_statistics_is_refused_with_the_reason():
    network = models.build("convnet", image_shape=(8, 8, 1), num_classes=4)
    _, without = glue_jax.partition(network.init(jax.random.key(3)), "^batch_stats/")
    with pytest.raises(ValueError, match="no BatchNorm statistics, as outside the experts' convex hull"):
        network.apply(without, jnp.zeros((2, 8, 8, 1)))


def test_a_flax_linen_networks_statistics_are_found_by_their_collection():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, momentum=0.0)(nn.Dense(2)(x))

    net = Net()
    variables = net.init(jax.random.key(4), DATA)

    def statistics_fn(variables, batch):
        return net.apply(variables, batch, mutable="batch_stats")[1]["batch_stats"]

    refreshed = refresh_statistics(variables, [DATA[:20], DATA[20:]], statistics_fn)
    whole = statistics_fn(variables, DATA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), refreshed["batch_stats"], whole)


@pytest.mark.parametrize(
    ("batches", "function", "message"),
    [
        ([], statistics, "batches is empty"),
        ([DATA], lambda params, batch: {"norm": {"mean": jnp.zeros(3)}}, "norm/mean has no partner"),
        ([DATA], lambda params, batch: {"norm": {"median": jnp.zeros(3)}}, "norm/median has no partner"),
        (
            [DATA],
            lambda params, batch: {"other": {"mean": jnp.zeros(3), "var": jnp.zeros(3)}},
            "returned nothing for batch_stats/norm/mean",
        ),
        (
            [DATA],
            lambda params, batch: {"norm": {"mean": jnp.zeros(2), "var": jnp.zeros(2)}},
            r"returned shape \(2,\) for batch_stats/norm/mean; expected \(3,\)",
        ),
        (
            [DATA],
            lambda params, batch: {name: {"mean": jnp.zeros(3), "var": jnp.zeros(3)} for name in ("norm", "another")},
            "params has no place for",
        ),
    ],
)
def test_statistics_that_do_not_fit_are_refused(batches, function, message):
    with pytest.raises(ValueError, match=message):
        refresh_statistics(PARAMS, batches, function)


@pytest.mark.parametrize("batches", [np.asarray(DATA), DATA, {"x": DATA}, Examples(np.zeros(2), np.zeros(2, int))])
def test_one_batch_in_place_of_several_is_refused(batches):
    with pytest.raises(TypeError, match=f"batches is a {type(batches).__name__}; expected an iterable of batches"):
        refresh_statistics(PARAMS, batches, statistics)


def test_a_loader_without_an_end_is_asked_for_so_many_batches():
    refreshed = refresh_statistics(PARAMS, itertools.repeat(DATA), statistics, num_batches=2)
    np.testing.assert_allclose(refreshed["batch_stats"]["norm"]["var"], 4 * DATA.var(axis=0), rtol=1e-4)
    with pytest.raises(ValueError, match="num_batches is 0; expected at least 1"):
        refresh_statistics(PARAMS, itertools.repeat(DATA), statistics, num_batches=0)


@pytest.mark.parametrize(
    ("mean", "var", "error", "message"),
    [
        (jnp.zeros(3), -jnp.ones(3), ValueError, "returned the variance -1.0 at norm/var; expected at least 0"),
        (jnp.zeros(3), jnp.full(3, jnp.nan), ValueError, "returned the variance nan at norm/var"),
        (
            jnp.zeros(3, int),
            jnp.ones(3),
            TypeError,
            "returned int32 at norm/mean; expected an array of a floating-point",
        ),
        (0.0, 1.0, TypeError, "returned float at norm/mean; expected an array"),
    ],
)
def test_statistics_that_are_none_are_refused_by_path(mean, var, error, message):
    with pytest.raises(error, match=message):
        refresh_statistics(PARAMS, [DATA], lambda params, batch: {"norm": {"mean": mean, "var": var}})


def test_a_negative_variance_of_a_later_batch_is_refused():
    found = iter([jnp.ones(3), -jnp.ones(3)])
    with pytest.raises(ValueError, match=r"returned the variance -1.0"):
        refresh_statistics(
            PARAMS, [DATA, DATA], lambda params, batch: {"norm": {"mean": jnp.zeros(3), "var": next(found)}}
        )


def test_statistics_of_a_flat_state_dict_of_pytorch_are_found_by_their_names():
    params = {
        "mean_pool.weight": jnp.array(2.0),
        "bn1.running_mean": jnp.zeros(3),
        "bn1.running_var": jnp.ones(3),
        "bn1.num_batches_tracked": jnp.array(5),
        "layer1.0.bn2.running_mean": jnp.zeros(3),
        "layer1.0.bn2.running_var": jnp.ones(3),
    }

    def flat(params, batch):
        x = {"bn1": batch * params["mean_pool.weight"], "layer1.0.bn2": batch}
        means = {f"{norm}.running_mean": jnp.mean(of_norm, axis=0) for norm, of_norm in x.items()}
        return means | {f"{norm}.running_var": jnp.var(of_norm, axis=0) for norm, of_norm in x.items()}

    refreshed = refresh_statistics(params, [DATA[:20], DATA[20:]], flat)
    for norm, factor in (("bn1", 2), ("layer1.0.bn2", 1)):
        np.testing.assert_allclose(refreshed[f"{norm}.running_mean"], factor * DATA.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(refreshed[f"{norm}.running_var"], factor**2 * DATA.var(axis=0), rtol=1e-4)
    assert refreshed["bn1.num_batches_tracked"] == 5

    def first_alone(params, batch):
        return {path: leaf for path, leaf in flat(params, batch).items() if path.startswith("bn1")}

    with pytest.raises(ValueError, match=r"statistics_fn returned nothing for layer1.0.bn2.running_mean"):
        refresh_statistics(params, [DATA], first_alone)


@pytest.mark.parametrize("with_collection", [True, False])
def test_statistics_of_flax_may_have_pytorchs_names_and_parameters_too(with_collection):
    params = {
        "params": {
            "scale": jnp.array(2.0),
            "norm": {"running_mean": jnp.array(7.0)},
            "ema_running_var": jnp.array(8.0),
        },
        "batch_stats": {"norm": {"running_mean": jnp.zeros(3), "running_var": jnp.ones(3)}},
    }

    def statistics_fn(params, batch):
        found = {"norm": {"running_mean": jnp.mean(batch, axis=0), "running_var": jnp.var(batch, axis=0)}}
        return {"batch_stats": found} if with_collection else found

    refreshed = refresh_statistics(params, [DATA], statistics_fn)
    np.testing.assert_allclose(refreshed["batch_stats"]["norm"]["running_mean"], DATA.mean(axis=0), rtol=1e-5)
    assert refreshed["params"] == params["params"]


def test_names_of_several_keys_and_collections_inside_a_path_are_patterns():
    # As Haiku has them, in a network of two parts.
    def stats(params, batch):
        found = {"mean": batch.mean(axis=0), "var": batch.var(axis=0)}
        return {"body": {"norm": {f"{name}_ema": {"average": leaf} for name, leaf in found.items()}}}

    empty = {"norm": {f"{name}_ema": {"average": jnp.zeros(3)} for name in ("mean", "var")}}
    params = {"body": {"state": empty, "params": jnp.ones(2)}}
    refreshed = refresh_statistics(
        params, [DATA], stats, collection="state/", mean="mean_ema/average", var="var_ema/average"
    )
    norm = refreshed["body"]["state"]["norm"]
    np.testing.assert_allclose(norm["mean_ema"]["average"], DATA.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(norm["var_ema"]["average"], DATA.var(axis=0), rtol=1e-5)


def test_what_statistics_fn_returns_may_hold_the_collection():
    whole = refresh_statistics(PARAMS, [DATA], lambda params, x: {"batch_stats": statistics(params, x)})
    jax.tree.map(np.testing.assert_array_equal, whole, refresh_statistics(PARAMS, [DATA], statistics))


def test_statistics_that_are_missing_altogether_are_refused():
    with pytest.raises(ValueError, match="statistics_fn returned no statistics"):
        refresh_statistics({"w": jnp.ones(2)}, [jnp.ones((3, 2))], lambda params, batch: {})
