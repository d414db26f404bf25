"""PyTorch networks with BatchNorm: from safetensors to learned coefficients, and back into PyTorch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import glue_jax
from glue_jax.checkpoints import load_experts, save_blend
from glue_jax.checkpoints.torch_modules import module_functions

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
nn = torch.nn

NUM_EXPERTS, CLASSES = 5, 10


def functions_of(module, **words):
    try:
        return module_functions(module, **words)
    except ImportError as error:
        pytest.skip(str(error))


class Net(nn.Module):
    """A small convolutional network with BatchNorm, dropout, and a buffer that is not in its state dict."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16, momentum=None)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(16, CLASSES)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.scale * self.head(self.dropout(x.mean((2, 3))))


class Attention(nn.Module):
    """Attention and a layer of a transformer, and an output layer with a tied weight."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
        self.out.weight = self.words.weight
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, words, mask):
        x = self.words(words)
        x = x + self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]
        return {"logits": self.out(self.layer(x, src_key_padding_mask=mask))}


class Digits(NamedTuple):
    paths: list
    target: dict
    validation: dict
    test: dict


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Experts in files, each trained on 200 digits that are mostly of four classes."""
    torch.manual_seed(0)
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)
    random = np.random.default_rng(0)
    order = random.permutation(len(labels))
    parts = {"experts": order[:1000], "target": order[1000:1300], "validation": order[1300:1400], "test": order[1400:]}
    initial = Net().state_dict()
    paths = []
    for index in range(NUM_EXPERTS):
        own = np.isin(labels[parts["experts"]], (2 * index + np.arange(4)) % CLASSES)
        rows = random.choice(parts["experts"], 200, replace=False, p=(own + 0.02) / (own + 0.02).sum())
        network = Net()
        network.load_state_dict(initial)
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        for step in range(60):
            batch = rows[np.arange(step * 40, step * 40 + 40) % len(rows)]
            optimizer.zero_grad()
            logits = network(torch.from_numpy(images[batch]))
            nn.functional.cross_entropy(logits, torch.from_numpy(labels[batch])).backward()
            optimizer.step()
        paths.append(tmp_path_factory.getbasetemp() / f"expert{index}.safetensors")
        safetensors_torch.save_file(network.state_dict(), paths[-1])
    data = [{"x": images[parts[name]], "y": labels[parts[name]].astype("int32")} for name in list(parts)[1:]]
    return Digits(paths, *data)


def in_torch(path, data):
    """What the model in a file makes of some images: its logits and its accuracy, by PyTorch alone."""
    network = Net()
    network.load_state_dict(safetensors_torch.load_file(path), strict=True)
    logits = network.eval()(torch.from_numpy(data["x"])).detach().numpy()
    return logits, np.mean(logits.argmax(axis=1) == data["y"])


def mean_loss(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_blend_of_modules_is_learned_in_jax_and_as_accurate_in_pytorch(digits, dtype, tmp_path):
    functions = functions_of(Net())
    assert functions.statistics_fn is not None
    stacked = load_experts(digits.paths)
    if dtype == "bfloat16":
        is_weight = {name: "running" not in name and "tracked" not in name for name in stacked}
        stacked = {name: leaf.astype(dtype) if is_weight[name] else leaf for name, leaf in stacked.items()}
    _, bank = glue_jax.partition(stacked, "running_")
    result = glue_jax.learn(
        jax.random.key(0),
        bank,
        digits.target,
        loss_fn=glue_jax.OutputLoss(functions.minibatch_fn, mean_loss),
        step_fn=glue_jax.gauss_newton_step,
        link_fn=glue_jax.unconstrained,
        validation_data=digits.validation,
        validation_batch_size=100,
        batch_size=50,
        max_steps=10,
    )
    blended = glue_jax.merging.refresh_statistics(
        glue_jax.blend(bank, result.alpha), [digits.target], jax.jit(functions.statistics_fn)
    )
    path = save_blend(tmp_path / "blend.safetensors", blended, like=digits.paths[0])
    logits, accuracy = in_torch(path, digits.test)
    ours = np.asarray(jax.jit(functions.outputs_fn)(blended, digits.test))
    np.testing.assert_allclose(ours, logits, rtol=1e-3, atol=1e-3)
    assert np.mean(ours.argmax(axis=1) == digits.test["y"]) == accuracy
    assert accuracy > max(in_torch(each, digits.test)[1] for each in digits.paths) + 0.05


def test_a_blend_is_learned_by_ask_and_tell_where_the_model_stays_in_pytorch(digits, tmp_path):
    stacked, network, blend = load_experts(digits.paths), Net().eval(), jax.jit(glue_jax.blend)

    def loss(alpha):
        blended = blend(stacked, alpha)
        network.load_state_dict({name: torch.from_numpy(np.array(leaf)) for name, leaf in blended.items()})
        with torch.no_grad():
            logits = network(torch.from_numpy(digits.target["x"]))
        return nn.functional.cross_entropy(logits, torch.from_numpy(digits.target["y"]).long()).item()

    optimizer = optax.adam(0.1)
    key, state = jax.random.key(1), glue_jax.init(NUM_EXPERTS, optimizer)
    options = {"num_directions": 2, "directions": "simplex_orthogonal"}
    before = loss(glue_jax.alpha(state))
    for _ in range(40):
        probes = glue_jax.ask(key, state, **options)
        state, _ = glue_jax.tell(probes, [loss(alpha) for alpha in np.asarray(probes.alpha)], optimizer=optimizer)
    after = loss(glue_jax.alpha(state))
    assert after < before - 0.05
    path = save_blend(
        tmp_path / "blend.safetensors", glue_jax.blend(stacked, glue_jax.alpha(state)), like=digits.paths[0]
    )
    logits, accuracy = in_torch(path, digits.test)
    with torch.no_grad():
        in_place = network(torch.from_numpy(digits.test["x"])).numpy()
    np.testing.assert_allclose(logits, in_place, rtol=1e-5, atol=1e-5)
    assert accuracy == np.mean(in_place.argmax(axis=1) == digits.test["y"])


def test_the_functions_compute_what_the_module_computes(digits):
    network, data = Net(), digits.test
    network.load_state_dict(safetensors_torch.load_file(digits.paths[0]))
    network.train()
    functions = functions_of(network)
    assert functions.statistics_fn is not None
    expert = jax.tree.map(lambda leaf: leaf[0], load_experts(digits.paths))
    np.testing.assert_allclose(
        jax.jit(functions.outputs_fn)(expert, data), in_torch(digits.paths[0], data)[0], rtol=1e-4, atol=1e-5
    )
    assert network.training
    network.dropout.eval()
    network.bn1.momentum = network.bn2.momentum = 1.0
    with torch.no_grad():
        expected = network(torch.from_numpy(data["x"])).numpy()
    blind = {name: None if "running" in name else leaf for name, leaf in expert.items()}
    np.testing.assert_allclose(jax.jit(functions.minibatch_fn)(blind, data), expected, rtol=1e-4, atol=1e-5)
    found = jax.jit(functions.statistics_fn)(blind, data)
    assert found.keys() == {name for name in expert if "running" in name}
    for name, statistic in found.items():
        # PyTorch's running variance is the unbiased one.
        n = len(data["x"]) * (64 if "bn1" in name else 16)
        factor = n / (n - 1) if "var" in name else 1
        np.testing.assert_allclose(factor * statistic, network.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_functions_are_vmapped_and_differentiated(digits):
    functions, stacked = functions_of(Net()), load_experts(digits.paths)
    data = {name: array[:20] for name, array in digits.target.items()}
    for function in (functions.outputs_fn, functions.minibatch_fn):

        def loss(alpha, function=function):
            return mean_loss(function(glue_jax.blend(stacked, alpha), data), data)

        alphas = jnp.eye(NUM_EXPERTS)[:2] * 0.6 + 0.08
        value, gradient = jax.jit(jax.value_and_grad(loss))(alphas[0])
        np.testing.assert_allclose(jax.jit(jax.vmap(loss))(alphas)[0], value, rtol=1e-4)
        _, slope = jax.jit(lambda at, along, loss=loss: jax.jvp(loss, (at,), (along,)))(*alphas)
        np.testing.assert_allclose(slope, gradient @ alphas[1], rtol=1e-3)


def test_attention_and_a_tied_weight_are_computed():
    torch.manual_seed(0)
    network = Attention()
    words, mask = torch.randint(0, 7, (3, 5)), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    expert = {name: leaf.numpy() for name, leaf in network.state_dict().items()}
    data = {"words": words.numpy(), "mask": mask.numpy(), "labels": np.zeros(3)}
    functions = functions_of(network)
    assert functions.statistics_fn is None
    assert functions.minibatch_fn is functions.outputs_fn
    expected = network.eval()(words, mask)["logits"].detach().numpy()
    np.testing.assert_allclose(
        jax.jit(functions.outputs_fn)(expert, data)[~mask.numpy()], expected[~mask.numpy()], atol=1e-5
    )
    del expert["out.weight"]
    found = jax.jit(functions_of(network, inputs=("words", "mask")).minibatch_fn)(expert, data)
    np.testing.assert_allclose(found[~mask.numpy()], expected[~mask.numpy()], atol=1e-5)


def test_what_does_not_fit_the_module_is_refused(digits):
    functions = functions_of(Net())
    expert = jax.tree.map(lambda leaf: leaf[0], load_experts(digits.paths))
    x = {"x": digits.test["x"]}
    with pytest.raises(ValueError, match=r"params has \['head.scale'\], which the module does not have"):
        functions.outputs_fn({**expert, "head.scale": np.ones(3)}, x)
    with pytest.raises(ValueError, match=r"lacks \['bn1.running_mean', .*; only minibatch_fn does without statistics"):
        functions.outputs_fn({name: leaf for name, leaf in expert.items() if "running" not in name}, x)
    with pytest.raises(ValueError, match=r"the batch has \['image'\]; expected 'x', or some of"):
        functions.outputs_fn(expert, {"image": x["x"]})
    with pytest.raises(TypeError, match=r"module is a dict; expected a torch\.nn\.Module"):
        module_functions({})
