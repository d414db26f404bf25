"""LoRA adapters, against PEFT itself."""

import copy
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import glue_jax
from glue_jax.blending import merge_for_learning
from glue_jax.checkpoints import (
    adapter_configs,
    add_adapter,
    load_adapters,
    merge_adapters,
    open_checkpoint,
    save_adapter,
)
from glue_jax.checkpoints.adapters import WEIGHTS
from glue_jax.checkpoints.formats import ADAPTER_CONFIG
from glue_jax.checkpoints.torch_format import to_numpy

torch = pytest.importorskip("torch", reason="PEFT's adapters are compared with PyTorch's own")
with pytest.MonkeyPatch.context() as patch:
    # Nothing is looked up on the network.
    patch.setenv("HF_HUB_OFFLINE", "1")
    peft = pytest.importorskip("peft", reason="PEFT writes and reads the adapters")
    transformers = pytest.importorskip("transformers", reason="the base is a model of transformers")

pytestmark = [
    # PEFT says that it stores an embedding, and that it cannot look up a model card.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

ALPHA = np.array([0.7, -0.4, 1.3])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
OPTIONS = [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 7, "v_proj": 100},
    },
    {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "embed_tokens"]},
]


def llama(dtype="float32"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(DTYPES[dtype]).eval()


def write_adapters(model, options, folder):
    """Writes adapters with random factors by PEFT; returns their folders, and PEFT's changes of the weights."""
    paths, changes = [], []
    for index, words in enumerate(options):
        torch.manual_seed(10 + index)
        config = peft.LoraConfig(init_lora_weights=False, **words)
        adapted = peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).eval()
        paths.append(folder / f"adapter{index}")
        adapted.save_pretrained(paths[-1])
        changes.append(changes_of(adapted))
    return paths, changes


def changes_of(adapted):
    return {
        name: to_numpy(module.get_delta_weight("default").float())
        for name, module in adapted.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight") and module.active_adapters
    }


def weights_of(model):
    return {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}


def blended(changes, alpha_of):
    """The sum of PEFT's changes, by module."""
    modules = {module for change in changes for module in change}
    return {
        module: sum(
            weight * change[module]
            for weight, change in zip(alpha_of(module), changes, strict=True)
            if module in change
        )
        for module in modules
    }


@pytest.fixture(scope="module", params=list(DTYPES))
def written(request, tmp_path_factory):
    model = llama(request.param)
    paths, changes = write_adapters(model, OPTIONS, tmp_path_factory.mktemp(request.param))
    return request.param, model, paths, changes


@pytest.fixture
def folder(tmp_path):
    """An adapter that PEFT would load, to spoil. It needs neither a base nor PEFT."""
    return plain_adapter(tmp_path / "adapter")


def plain_adapter(path, module="layer", rank=2, inner=3, outer=4, dtype="float32", **entries):
    path.mkdir()
    random = np.random.default_rng(0)
    factors = {
        f"base_model.model.{module}.lora_A.weight": random.normal(size=(rank, inner)).astype(dtype),
        f"base_model.model.{module}.lora_B.weight": random.normal(size=(outer, rank)).astype(dtype),
    }
    save_file(factors, path / WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "base", **entries}
    (path / ADAPTER_CONFIG).write_text(json.dumps(config))
    return path


def change_config(folder, **entries):
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_written_blend_is_the_sum_of_pefts_changes_and_peft_loads_it(written, tmp_path):
    dtype, model, paths, changes = written
    adapters = load_adapters(paths)
    out = save_adapter(tmp_path / "blend", adapters, ALPHA, side_files={"card.md": "text"})
    assert (out / "card.md").read_text() == "text"
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), out, autocast_adapter_dtype=False).eval()
    expected = blended(changes, lambda module: ALPHA)
    found = changes_of(loaded)
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        np.testing.assert_allclose(found[module], change, atol=TOLERANCE[dtype] * np.abs(change).max())
    # No weight of the base is another one.
    tensors = open_checkpoint(out / WEIGHTS).tensors
    assert {str(np.dtype(tensor.dtype)) for tensor in tensors.values()} == {dtype}
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    assert adapters.ranks[module] == (4, 5, 2)
    assert tensors[f"{module}.lora_A.weight"].shape == (11, 32)
    config = json.loads((out / ADAPTER_CONFIG).read_text())
    assert (config["inference_mode"], config["task_type"], config["use_rslora"]) == (True, None, False)


def test_the_outputs_with_a_written_blend_are_those_of_the_base_with_merged_changes(written, tmp_path):
    dtype, model, paths, changes = written
    loaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(model), save_adapter(tmp_path / "blend", load_adapters(paths), ALPHA)
    ).eval()
    merged = copy.deepcopy(model).float()
    state = merged.state_dict()
    for module, change in blended(changes, lambda module: ALPHA).items():
        state[f"{module}.weight"] += torch.from_numpy(change)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected, found = merged(tokens).logits.numpy(), loaded(tokens).logits.float().numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=(1e-4 if dtype == "float32" else 0.1) * scale)
    with torch.no_grad():
        base = model(tokens).logits.float().numpy()
    assert np.abs(base - expected).max() > 0.5 * scale


def test_modules_have_coefficients_of_their_own(written, tmp_path):
    dtype, model, paths, changes = written
    adapters = load_adapters(paths)
    groups = glue_jax.merging.group_by_path(adapters.experts, r"layers\.\d+")
    assert sorted(groups.names) == ["layers.0", "layers.1", "rest"]
    alpha = np.random.default_rng(0).normal(size=(3, 3))

    def alpha_of(module):
        name = re.search(r"layers\.\d+", module)
        return alpha[groups.names.index(name[0] if name else "rest")]

    expected = blended(changes, alpha_of)
    out = save_adapter(tmp_path / "blend", adapters, alpha, groups.rows)
    found = changes_of(peft.PeftModel.from_pretrained(copy.deepcopy(model), out, autocast_adapter_dtype=False))
    merged = jax.jit(functools.partial(merge_adapters, groups=groups.rows, min_dtype=jnp.float32))(
        adapters.experts, alpha
    )
    base = weights_of(model)
    weights = add_adapter(base, merged)
    for module, change in expected.items():
        atol = TOLERANCE[dtype] * np.abs(change).max()
        np.testing.assert_allclose(found[module], change, atol=atol)
        weight = f"{module}.weight"
        assert weights[weight].dtype == jnp.float32
        np.testing.assert_allclose(weights[weight] - base[weight].astype(np.float32), change, atol=atol)
    assert {name for name in base if weights[name] is not base[name]} == {f"{module}.weight" for module in expected}


def test_one_adapter_with_coefficient_one_stays_the_same_function(written, tmp_path):
    _, model, paths, changes = written
    out = save_adapter(tmp_path / "blend", load_adapters(paths), [0, 0, 1])
    found = changes_of(peft.PeftModel.from_pretrained(copy.deepcopy(model), out, autocast_adapter_dtype=False))
    # Its scaling is 8, so nothing is rounded.
    for module, change in changes[2].items():
        np.testing.assert_allclose(found[module], change, rtol=1e-6, atol=1e-6 * np.abs(change).max())
    assert not any(found[module].any() for module in found.keys() - changes[2].keys())


def test_a_learned_merge_keeps_float32_and_has_the_product_of_the_written_one(written, tmp_path):
    dtype, model, paths, _ = written
    adapters = load_adapters(paths)
    learned = merge_for_learning(merge_adapters)
    merged = jax.jit(learned)(adapters.experts, jnp.asarray(ALPHA, jnp.float32))
    assert {leaf.dtype for leaf in merged.values()} == {jnp.dtype("float32")}
    out = save_adapter(tmp_path / "blend", adapters, ALPHA)
    alone = merge_adapters(load_adapters([out]).experts, jnp.ones(1))
    base = {name: weight.astype(np.float32) for name, weight in weights_of(model).items()}
    expected = add_adapter(base, merged)
    for name, weight in add_adapter(base, alone).items():
        np.testing.assert_allclose(weight, expected[name], atol=TOLERANCE[dtype] * np.abs(expected[name]).max())


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.square = torch.nn.Linear(4, 4)
        self.transposed = transformers.pytorch_utils.Conv1D(6, 4)
        self.wide = torch.nn.Conv2d(3, 5, 3)
        self.point = torch.nn.Conv2d(3, 5, 1)
        self.line = torch.nn.Conv1d(3, 5, 3)
        self.words = torch.nn.Embedding(7, 4)

    def forward(self, x):
        return self.square(x)


@pytest.mark.parametrize("names", [["square", "wide", "point", "line", "words"], ["transposed"]])
def test_the_merged_weights_are_those_that_peft_merges(names, tmp_path):
    torch.manual_seed(0)
    model = Layers()
    options = [
        {"r": rank, "lora_alpha": 3, "target_modules": names, "fan_in_fan_out": names == ["transposed"]}
        for rank in (2, 3)
    ]
    paths, changes = write_adapters(model, options, tmp_path)
    adapters = load_adapters(paths)
    base = weights_of(model)
    weights = add_adapter(base, merge_adapters(adapters.experts, jnp.array([2.0, -0.5])))
    for module, change in blended(changes, lambda module: [2.0, -0.5]).items():
        np.testing.assert_allclose(weights[f"{module}.weight"] - base[f"{module}.weight"], change, atol=1e-5)
    assert {module.removeprefix("base_model.model.") for module in adapters.ranks} == set(names)
    loaded = peft.PeftModel.from_pretrained(model, save_adapter(tmp_path / "blend", adapters, [2.0, -0.5]))
    merged = weights_of(loaded.merge_and_unload())
    for name in weights:
        np.testing.assert_allclose(merged[name], weights[name], atol=1e-5)


def test_a_square_weight_is_transposed_where_the_adapter_says_so(folder, tmp_path):
    path = plain_adapter(tmp_path / "square", inner=3, outer=3)
    adapter = merge_adapters(load_adapters([path]).experts, jnp.ones(1))
    base = {"layer.weight": jnp.zeros((3, 3))}
    straight = add_adapter(base, adapter)["layer.weight"]
    np.testing.assert_array_equal(add_adapter(base, adapter, fan_in_fan_out=True)["layer.weight"], straight.T)


def test_an_adapter_in_a_file_of_pytorch_is_read(folder):
    expected = load_adapters([folder]).experts
    arrays = open_checkpoint(folder / WEIGHTS).read(list(open_checkpoint(folder / WEIGHTS).tensors))
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    jax.tree.map(np.testing.assert_array_equal, load_adapters([folder]).experts, expected)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'; expected 'LORA'"),
        ({"use_dora": True}, "use_dora=True.*DoRA"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True.*biases"),
        ({"modules_to_save": ["score"]}, r"modules_to_save=\['score'\].*whole trained modules"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication.*repeats layers"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens.*some tokens"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"kasa_config": {"a": 1}}, "kasa_config"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config"),
        ({"velora_config": {"a": 1}}, "velora_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'.*PiSSA.*another base.*save_pre"),
        ({"init_lora_weights": "olora"}, "OLoRA"),
        ({"init_lora_weights": "corda"}, "CorDA"),
        ({"init_lora_weights": "lora_ga"}, "LoRA-GA"),
        ({"init_lora_weights": "loftq"}, "LoftQ quantizes"),
        ({"init_lora_weights": "news"}, "init_lora_weights='news'; expected one of true, false"),
        ({"use_news": 3}, "use_news=3, which is unknown"),
        ({"r": None}, "r=None; expected a number"),
        ({"r": 3}, "rank 2 at base_model.model.layer, but its configuration says 3"),
        ({"rank_pattern": {"layer": 1}}, "configuration says 1"),
        ({"rank_pattern": {"*": 1}}, "'[*]' in rank_pattern, which is no pattern"),
    ],
)
def test_what_cannot_be_blended_is_refused_by_name(entries, message, folder):
    load_adapters([folder])
    change_config(folder, **entries)
    with pytest.raises(ValueError, match=message) as raised:
        load_adapters([folder])
    assert str(folder) in str(raised.value)


def test_every_entry_of_pefts_configuration_is_known_or_refused(folder):
    """An entry that is new in PEFT makes this test fail. Then read what it does."""
    change_config(folder, **peft.LoraConfig(r=2, base_model_name_or_path="base").to_dict() | {"target_modules": ["a"]})
    load_adapters([folder])
    assert peft.LoraConfig().to_dict().keys() <= adapter_configs.KNOWN | adapter_configs.REFUSED.keys()


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_alone_are_accepted(start, folder, tmp_path):
    change_config(folder, init_lora_weights=start)
    out = save_adapter(tmp_path / "blend", load_adapters([folder]), [1.0])
    assert json.loads((out / ADAPTER_CONFIG).read_text())["init_lora_weights"] is True


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer.lora_magnitude_vector.weight"], "lora_magnitude_vector.weight, so it is a DoRA adapter"),
        (["layer.lora_B.bias"], "lora_B.bias, which is no factor"),
        (["head.weight"], "head.weight, which is no factor"),
        (["other.lora_A.weight"], "other.lora_A.weight without .*other.lora_B.weight"),
        (["other.lora_embedding_B"], "other.lora_embedding_B without .*other.lora_embedding_A"),
        (["a.base_layer.b.lora_A.weight"], "within another adapted module"),
    ],
)
def test_tensors_that_are_no_factors_are_refused_by_name(names, message, folder):
    spoil(folder, {name: np.zeros((2, 2), np.float32) for name in names})
    with pytest.raises(ValueError, match=message):
        load_adapters([folder])


def spoil(folder, more):
    held = open_checkpoint(folder / WEIGHTS)
    save_file({**held.read(list(held.tensors)), **more}, folder / WEIGHTS)


def test_a_convolution_with_groups_is_refused(folder):
    shapes = {"A": (2, 3, 3), "B": (4, 1, 1)}
    spoil(folder, {f"conv.lora_{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match="convolution with groups"):
        load_adapters([folder])


def test_adapters_of_different_bases_are_refused_and_the_caller_may_know_better(folder, tmp_path):
    other = plain_adapter(tmp_path / "other", base_model_name_or_path="/home/base")
    with pytest.raises(ValueError, match=r"base_model_name_or_path='/home/base', but .* has 'base'"):
        load_adapters([folder, other])
    assert load_adapters([folder, other], base="base").base == "base"
    change_config(other, base_model_name_or_path="base", revision="2")
    with pytest.raises(ValueError, match=r"revision='2', but .* has None"):
        load_adapters([folder, other])


@pytest.mark.parametrize("words", [{"inner": 5}, {"outer": 5}, {"dtype": "float16"}])
def test_adapters_that_change_other_weights_are_refused(words, folder, tmp_path):
    with pytest.raises(ValueError, match=r"lora_[AB].weight, but .* expected the same dtype"):
        load_adapters([folder, plain_adapter(tmp_path / "other", **words)])


def test_copies_of_the_embedding_must_be_equal(folder, tmp_path):
    other = plain_adapter(tmp_path / "other")
    for index, path in enumerate((folder, other)):
        spoil(path, {"base_model.model.words.base_layer.weight": np.full((2, 2), index, np.float32)})
    with pytest.raises(ValueError, match="embedding of one base"):
        load_adapters([folder, other])


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        load_adapters([tmp_path])
    with pytest.raises(ValueError, match="paths is empty"):
        load_adapters([])
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither adapter_model.safetensors nor"):
        load_adapters([folder])
    (folder / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_adapters([folder])


def test_a_factor_that_is_not_finite_is_refused(folder):
    spoil(folder, {"base_model.model.layer.lora_A.weight": np.full((2, 3), np.nan, np.float32)})
    with pytest.raises(ValueError, match=r"nan at base_model.model.layer.lora_A.weight"):
        load_adapters([folder])


def test_a_blend_that_does_not_fit_its_dtype_leaves_nothing(tmp_path):
    adapters = load_adapters([plain_adapter(tmp_path / "short", dtype="float16")])
    with pytest.raises(ValueError, match=r"inf at base_model.model.layer.lora_B.weight"):
        save_adapter(tmp_path / "blend", adapters, [1e6])
    assert not (tmp_path / "blend").exists()
    save_adapter(tmp_path / "blend", adapters, [1.0])
    with pytest.raises(FileExistsError):
        save_adapter(tmp_path / "blend", adapters, [1.0])
    save_adapter(tmp_path / "blend", adapters, [2.0], overwrite=True)


def test_experts_that_are_no_adapters_are_not_merged():
    with pytest.raises(ValueError, match="which are no factors of LoRA"):
        merge_adapters({"fc.weight": jnp.ones((2, 3))}, jnp.ones(2) / 2)


def test_coefficients_and_groups_that_do_not_fit_are_refused(folder, tmp_path):
    adapters = load_adapters([folder])
    with pytest.raises(ValueError, match=r"alpha has shape \(2,\); expected \[K\] with K = 1"):
        merge_adapters(adapters.experts, jnp.ones(2))
    with pytest.raises(ValueError, match=r"alpha is .*nan"):
        save_adapter(tmp_path / "blend", adapters, [np.nan])
    apart = glue_jax.merging.group_by_path(adapters.experts, "lora_[AB]")
    with pytest.raises(ValueError, match="expected one row a module"):
        merge_adapters(adapters.experts, jnp.ones((3, 1)), apart.rows)
    with pytest.raises(ValueError, match="expected one of the 1 rows"):
        merge_adapters(adapters.experts, jnp.ones((1, 1)), 3)


def test_a_base_that_does_not_fit_is_refused(folder):
    adapter = merge_adapters(load_adapters([folder]).experts, jnp.ones(1))
    with pytest.raises(ValueError, match=r"base has no layer.weight"):
        add_adapter({"other.weight": jnp.zeros((4, 3))}, adapter)
    with pytest.raises(ValueError, match=r"float32 of shape \(2, 2\) at layer.weight"):
        add_adapter({"layer.weight": jnp.zeros((2, 2))}, adapter)
    with pytest.raises(ValueError, match="int8"):
        add_adapter({"layer.weight": jnp.zeros((4, 3), jnp.int8)}, adapter)


def test_gauss_newton_finds_known_coefficients(tmp_path):
    paths = [plain_adapter(tmp_path / str(rank), rank=rank, inner=6, outer=3, lora_alpha=4) for rank in (1, 2, 3)]
    adapters = load_adapters(paths)
    random = np.random.default_rng(0)
    base = {"layer.weight": jnp.asarray(random.normal(size=(3, 6)), jnp.float32)}
    truth = jnp.array([0.5, -0.8, 1.2])

    def outputs_fn(adapter, batch):
        return batch["x"] @ add_adapter(base, adapter)["layer.weight"].T

    x = jnp.asarray(random.normal(size=(128, 6)), jnp.float32)
    data = {"x": x, "y": outputs_fn(merge_adapters(adapters.experts, truth), {"x": x})}
    result = glue_jax.learn(
        jax.random.key(0),
        adapters.experts,
        data,
        loss_fn=glue_jax.OutputLoss(outputs_fn, lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2)),
        merge_fn=merge_adapters,
        link_fn=glue_jax.unconstrained,
        step_fn=glue_jax.gauss_newton_step,
        max_steps=20,
    )
    np.testing.assert_allclose(result.last_alpha, truth, atol=1e-3)
