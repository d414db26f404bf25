import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import glue_jax
from glue_jax.checkpoints import Checkpoint, blend_files, load_experts, open_checkpoint, open_checkpoints, provenance
from glue_jax.merging import by_layer
from tests.library.checkpoints.helpers import read, save, save_shards, weights

ALPHA = {"bn": [1, 0, 0], "fc1": [0.2, 0.3, 0.5], "fc2": [0.5, -0.5, 1]}


@pytest.fixture
def folders(tmp_path):
    return [save_shards(tmp_path / f"model{seed}", seed, jnp.bfloat16) for seed in range(3)]


def by_layers(paths):
    """The experts, and coefficients by layer."""
    checkpoints = open_checkpoints(paths)
    groups = by_layer(load_experts(checkpoints))
    alpha = np.array([ALPHA[name] for name in groups.names])
    return checkpoints, provenance.coefficients_for(checkpoints[0].tensors, alpha, groups)


def written(paths, out, learned=None, report=""):
    """Blends by layer, with provenance."""
    checkpoints, coefficients = by_layers(paths)
    made = provenance.record(provenance.identities(checkpoints), coefficients, learned)
    side_files = provenance.side_files(checkpoints, made, report)
    return blend_files(checkpoints, coefficients.of, out, side_files=side_files)


def test_the_record_names_groups_tensors_hashes_and_versions(folders, tmp_path):
    out = written(folders, tmp_path / "out", {"seed": 3})
    made = json.loads((out / "glue.json").read_text())
    assert {group["name"]: group["alpha"] for group in made["groups"]} == ALPHA
    assert {group["name"]: group["tensors"] for group in made["groups"]}["fc1"] == ["fc1.bias", "fc1.weight"]
    assert made["experts"][1] == {
        "path": str(folders[1]),
        "format": "safetensors",
        "sha256": open_checkpoint(folders[1]).sha256(),
    }
    assert made["learned"] == {"seed": 3}
    assert made["versions"]["glue_jax"] == glue_jax.__version__


@pytest.mark.parametrize("kind", ["folder", "json", "file"])
def test_a_record_gives_the_same_blend_again(tmp_path, kind):
    paths = save(tmp_path)
    out = written(paths, tmp_path / ("out.safetensors" if kind == "file" else "out"))
    checkpoints = open_checkpoints(paths)
    again = provenance.read_coefficients(out / "glue.json" if kind == "json" else out, checkpoints[0].tensors)
    blend_files(checkpoints, again.of, tmp_path / "again.safetensors")
    first, second = read(out), read(tmp_path / "again.safetensors")
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("text", ["no json", "[]", '{"groups": 3}', '{"groups": [{"name": "a"}]}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "glue.json").write_text(text)
    with pytest.raises(ValueError, match=r"glue\.json is no record of a blend"):
        provenance.read_coefficients(tmp_path / "glue.json", open_checkpoint(save(tmp_path)[0]).tensors)


def test_a_record_of_another_network_is_refused(tmp_path):
    groups = [{"name": "all", "alpha": [1.0], "tensors": ["fc1.weight"]}]
    (tmp_path / "glue.json").write_text(json.dumps({"groups": groups}))
    with pytest.raises(ValueError, match="has no coefficients for"):
        provenance.read_coefficients(tmp_path, open_checkpoint(save(tmp_path)[0]).tensors)


def test_the_card_has_front_matter_the_coefficients_and_the_report(folders, tmp_path):
    card = (written(folders, tmp_path / "out", report="| model | value |\n") / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- merge\n- glue-jax\n---\n")
    assert "| 1 model1 | 0.0000 | 0.3000 | -0.5000 |" in card or "| 1 model1 | 0.3000 | 0.0000 | -0.5000 |" in card
    assert card.endswith("| model | value |\n")


def test_the_card_says_whether_statistics_are_no_sum(folders, tmp_path):
    sentence = "BatchNorm's statistics are no such sum: they were estimated anew on the target data."
    assert sentence in (written(folders, tmp_path / "a", {"statistics_refreshed": True}) / "README.md").read_text()
    assert sentence not in (written(folders, tmp_path / "b") / "README.md").read_text()


def test_there_is_a_recipe_only_for_what_mergekit_makes(folders, tmp_path):
    plain = [save_shards(tmp_path / f"plain{seed}", seed, counter=False) for seed in range(3)]
    assert (written(plain, tmp_path / "a") / "mergekit.yaml").exists()
    assert not (written(plain, tmp_path / "b", {"statistics_refreshed": True}) / "mergekit.yaml").exists()
    # mergekit would blend the counter.
    assert not (written(folders, tmp_path / "d") / "mergekit.yaml").exists()
    assert not (written(save(tmp_path), tmp_path / "c") / "mergekit.yaml").exists()


def test_what_is_said_of_an_earlier_blend_is_not_kept(tmp_path):
    paths = save(tmp_path)
    first = written(paths, tmp_path / "first.safetensors")
    again = [first, *paths[1:]]
    checkpoints = open_checkpoints(again)
    assert provenance.PROVENANCE_KEY in checkpoints[0].metadata
    blend_files(checkpoints, [1, 0, 0], tmp_path / "second")
    assert open_checkpoint(tmp_path / "second").metadata == {"format": "pt", "made": "by a test"}
    folders = [save_shards(tmp_path / f"model{seed}", seed, counter=False) for seed in range(3)]
    earlier = written(folders, tmp_path / "earlier")
    blend_files(open_checkpoints([earlier, *folders]), [1, 0, 0, 0], tmp_path / "later")
    assert not {"glue.json", "README.md", "mergekit.yaml"} & {path.name for path in (tmp_path / "later").iterdir()}


def test_experts_of_one_name_are_told_apart_in_the_card(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file(weights(0), tmp_path / name / "model.safetensors")
    checkpoints = open_checkpoints([tmp_path / name / "model.safetensors" for name in ("a", "b")])
    made = provenance.record(
        provenance.identities(checkpoints), provenance.coefficients_for(checkpoints[0].tensors, [0.5, 0.5])
    )
    card = provenance.side_files(checkpoints, made)["README.md"]
    assert "| 0 a/model.safetensors | 0.5000 |" in card


def test_a_name_within_a_longer_name_has_its_own_coefficient_in_the_recipe():
    made = {
        "groups": [
            {"name": "a", "alpha": [1e-05], "tensors": ["fc.weight"]},
            {"name": "b", "alpha": [1.0], "tensors": ["block.fc.weight", "other", "more"]},
        ]
    }
    one = Checkpoint(
        Path("/a"),
        "safetensors",
        {"fc.weight": jax.ShapeDtypeStruct((2,), np.float32)},
        files={},
        metadata={},
        structure={},
        index=None,
        reader=lambda names: {},
    )
    filters = [line for line in provenance.mergekit_recipe([one], made).splitlines() if "value" in line]
    assert [line.strip(" -") for line in filters] == [
        '{filter: "block.fc.weight", value: 1.0}',
        '{filter: "fc.weight", value: 1.00000000000000008e-05}',
        "{value: 1.0}",
    ]


def test_mergekit_makes_the_same_blend_bit_for_bit(tmp_path):
    reason = "mergekit is not installed: pip install 'glue_jax[foreign]'"
    merge, config = (pytest.importorskip(f"mergekit.{name}", reason=reason) for name in ("merge", "config"))
    torch, transformers, yaml = (pytest.importorskip(name, reason=reason) for name in ("torch", "transformers", "yaml"))
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **heads)).to(torch.bfloat16)
        model.save_pretrained(tmp_path / f"model{seed}")
        folders.append(tmp_path / f"model{seed}")
    checkpoints = open_checkpoints(folders)
    groups = by_layer(load_experts(checkpoints))
    alpha = np.random.default_rng(0).normal(size=(len(groups.names), 3))
    coefficients = provenance.coefficients_for(checkpoints[0].tensors, alpha, groups)
    made = provenance.record(provenance.identities(checkpoints), coefficients)
    out = blend_files(
        checkpoints, coefficients.of, tmp_path / "out", side_files=provenance.side_files(checkpoints, made)
    )
    recipe = config.MergeConfiguration.model_validate(yaml.safe_load((out / "mergekit.yaml").read_text()))
    merge.run_merge(recipe, str(tmp_path / "theirs"), merge.MergeOptions(quiet=True, copy_tokenizer=False))
    ours, theirs = read(out), read(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == jnp.bfloat16
        assert np.array_equal(tensor.view(np.uint16), theirs[name].view(np.uint16)), name
