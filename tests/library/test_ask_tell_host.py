"""A model behind a function on the host: scikit-learn's networks, judged by scikit-learn's F1."""

import jax
import numpy as np
import optax
import pytest

import glue_jax

datasets, scores, neural_network = (
    pytest.importorskip(f"sklearn.{name}", reason="scikit-learn is not installed: pip install 'glue_jax[experiments]'")
    for name in ("datasets", "metrics", "neural_network")
)
NUM_EXPERTS = 4


@pytest.fixture(scope="module")
def digits():
    """Images and labels in three parts: for the experts, to learn the coefficients, and for the test."""
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return [(images[rows] / 16, labels[rows]) for rows in np.split(order, [800, 1200])]


@pytest.fixture(scope="module")
def networks(digits):
    """Networks with the same first weights. Each is trained on seven of the ten classes."""
    images, labels = digits[0]
    trained = []
    for index in range(NUM_EXPERTS):
        rows = np.isin(labels, (3 * index + np.arange(7)) % 10)
        network = neural_network.MLPClassifier((16,), learning_rate_init=0.01, random_state=0)
        for _ in range(15):
            network.partial_fit(images[rows], labels[rows], classes=np.arange(10))
        trained.append(network)
    return trained


def test_f1_on_the_host_is_learned_from_and_a_failed_evaluation_does_not_end_the_run(digits, networks):
    weights = [{"kernels": network.coefs_, "biases": network.intercepts_} for network in networks]
    stacked = glue_jax.stack_experts([jax.tree.map(np.float32, each) for each in weights])
    blend, model, calls = jax.jit(glue_jax.blend), networks[0], []

    def f1(alpha, data):
        images, labels = data
        calls.append(alpha)
        if len(calls) == 30:
            raise ConnectionError("the server of the model does not answer")
        blended = jax.tree.map(np.asarray, blend(stacked, alpha))
        model.coefs_, model.intercepts_ = blended["kernels"], blended["biases"]
        return scores.f1_score(labels, model.predict(images), average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]

    def loss(alpha):
        try:
            return 1 - f1(alpha, digits[1])
        except ConnectionError:
            return None

    optimizer = optax.adam(0.1)
    key, state = jax.random.key(0), glue_jax.init(NUM_EXPERTS, optimizer)
    before, failed = f1(glue_jax.alpha(state), digits[2]), 0
    for _ in range(25):
        # F1 changes by steps, so the probes go far.
        probes = glue_jax.ask(key, state, radius=0.5, num_directions=2, directions="simplex_orthogonal")
        losses = [loss(alpha) for alpha in np.asarray(probes.alpha)]
        state, metrics = glue_jax.tell(probes, losses, optimizer=optimizer)
        failed += None in losses
        assert np.isnan(metrics.probe_losses).any() == (None in losses)
    assert failed == 1
    assert int(state.step) == 25
    after = f1(glue_jax.alpha(state), digits[2])
    # Better than each expert.
    assert after > max(f1(alpha, digits[2]) for alpha in np.eye(NUM_EXPERTS))
    assert after > before + 0.05
