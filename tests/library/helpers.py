"""Small problems that the tests of the library share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import glue_jax

# The blend of these two is alpha[1].
EXPERTS = {"w": jnp.array([0.0, 1.0])}
OPTIMIZER = optax.sgd(0.5)
ADAM = optax.adam(0.1)
STEPS = [glue_jax.spsa_step, glue_jax.forward_gradient_step, glue_jax.full_gradient_step]
DATA = jnp.linspace(0.0, 1.0, 50)


def upward(params, batch):
    """Falls as the blend rises, whatever the batch."""
    return -params["w"] + 0 * jnp.mean(batch)


def squared(params, batch):
    return jnp.mean((params["w"] - batch) ** 2)


def learn(**words) -> glue_jax.LearnResult:
    defaults: dict[str, Any] = {
        "key": jax.random.key(0),
        "experts": EXPERTS,
        "data": DATA,
        "loss_fn": upward,
        "optimizer": OPTIMIZER,
        "step_fn": glue_jax.full_gradient_step,
        "batch_size": 8,
        "max_steps": 20,
        "validate_every": 5,
    }
    return glue_jax.learn(**(defaults | words))


def losing(at, value):
    """Returns a step whose loss is `value` at one step."""

    def step_fn(key, state, experts, batch, **words):
        after, metrics = glue_jax.full_gradient_step(key, state, experts, batch, **words)
        return after, metrics._replace(loss=jnp.where(state.step == at, value, metrics.loss))

    return step_fn


class Loader:
    """Iterated anew each epoch, as PyTorch's and grain's are."""

    def __init__(self, batches):
        self.batches, self.epochs, self.given = batches, 0, 0

    def __iter__(self):
        self.epochs += 1
        for batch in self.batches:
            self.given += 1
            yield batch


class Tensor:
    """As PyTorch's: an array to NumPy alone, whose dtype JAX does not know."""

    dtype = "torch.float32"

    def __init__(self, array):
        self.array, self.shape = np.asarray(array), np.shape(array)

    def __array__(self, dtype=None, copy=None):
        return self.array


@jax.custom_vjp
def forward_only(x):
    return x


def refuse(*_):
    raise NotImplementedError("no reverse derivative\nof this layer")


forward_only.defvjp(refuse, refuse)


K, FEATURES = 4, 6


def network(params, batch):
    """A network with a hidden layer and logits of three classes."""
    return jnp.tanh(batch["x"] @ params["first"]) @ params["second"]


def cross_entropy(outputs, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"]))


CLASSIFICATION = glue_jax.OutputLoss(network, cross_entropy)


def classification(seed=0, dtype=jnp.float32, examples=240):
    """Four noisy versions of a network, and examples that it labels."""
    rng = np.random.default_rng(seed)
    shapes = {"first": (FEATURES, 16), "second": (16, 3)}
    truth = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    noise = np.array([0.5, 0.8, 1.0, 1.5])
    experts = {
        name: jnp.asarray(np.stack([leaf + scale * rng.normal(size=leaf.shape) for scale in noise]), dtype)
        for name, leaf in truth.items()
    }
    x = rng.normal(size=(examples, FEATURES))
    y = np.argmax(np.tanh(x @ truth["first"]) @ truth["second"], axis=1)
    return experts, {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.int32)}
