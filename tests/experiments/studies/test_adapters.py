"""The study of LoRA adapters: its network in JAX is the one in PyTorch, and its table has a row for each adapter."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import adapters
from glue_jax.checkpoints.torch_format import to_numpy

torch = pytest.importorskip("torch", reason="the study's network is one of PyTorch")


def test_the_network_in_jax_is_the_one_in_pytorch():
    torch.manual_seed(0)
    model = adapters.network(torch).eval()
    weights = {name: jnp.asarray(to_numpy(tensor)) for name, tensor in model.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(3, 16, 4)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(adapters.outputs(weights, jnp.asarray(x)), expected, atol=1e-5)


def test_a_patch_has_the_pixels_of_its_place():
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    found = (adapters.patches(image) + 1) * 127.5
    assert found.shape == (1, 16, 4)
    np.testing.assert_allclose(found[0, 5], [18, 19, 26, 27], atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_small_run_reports_every_blend(tmp_path):
    pytest.importorskip("peft", reason="PEFT trains the study's adapters")
    words = ["--seeds", "0", "--base-steps", "20", "--adapter-steps", "10", "--learning-steps", "5"]
    results = adapters.main([*words, "--out-dir", str(tmp_path)])
    names = [row["adapter"] for row in results["rows"]]
    assert len(names) == len(set(names)) == 6
    assert all(np.isfinite(row["losses"]).all() and len(row["losses"]) == 1 for row in results["rows"])
    losses = {row["adapter"]: row["losses"][0] for row in results["rows"]}
    assert losses["learned coefficients"] < losses["average of the products"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert adapters.present(kept).markdown == (tmp_path / "report.md").read_text()
