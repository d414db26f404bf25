"""What to learn the coefficients by, beside the loss of Eq. (2): SPSA needs no gradient of it.

    loss_fn = lambda params, batch: glue_jax.error_rate(apply(params, batch["x"]), batch["y"])

A metric that counts has no slope at a small radius: give `spsa_step` one at which it changes (`glue_jax.calibrate`
finds it), or learn on a surrogate and validate on the metric (`validation_fn`).
"""

import jax
import jax.numpy as jnp


def error_rate(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns 1 - accuracy, `[]`, of logits `[B, C]` and labels, integers `[B]`."""
    return jnp.mean(jnp.argmax(logits, axis=-1) != labels)


def entropy(logits: jax.Array) -> jax.Array:
    """Returns the mean entropy of predictions in nats, `[]`, of logits `[B, C]`: an objective without labels.

    AdaMerging's (Yang et al., 2024, https://arxiv.org/abs/2310.02575).
    """
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1))
