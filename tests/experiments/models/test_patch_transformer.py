"""The transformer in JAX is the one in PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import patch_transformer
from glue_jax.checkpoints.torch_format import to_numpy


def test_the_network_in_jax_is_the_one_in_pytorch():
    torch = pytest.importorskip("torch", reason="one of the two networks is of PyTorch")
    torch.manual_seed(0)
    model = patch_transformer.network(torch).eval()
    weights = {name: jnp.asarray(to_numpy(tensor)) for name, tensor in model.state_dict().items()}
    x = np.random.default_rng(0).normal(size=(3, 16, 4)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(patch_transformer.outputs(weights, jnp.asarray(x)), expected, atol=1e-5)


def test_a_patch_has_the_pixels_of_its_place():
    image = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    found = (patch_transformer.patches(image) + 1) * 127.5
    assert found.shape == (1, 16, 4)
    np.testing.assert_allclose(found[0, 5], [18, 19, 26, 27], atol=1e-4)
