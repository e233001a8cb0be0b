"""A language model's train step in Equinox: LoRA on frozen layers and on the head, padding, micro-batches, donation.

`python notebooks/examples/train_equinox.py` prints a falling loss: some seconds on a CPU. It needs equinox and optax.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jce

CLASSES, WIDTH, LAYERS, RANK = 2048, 64, 2, 8
MICRO_BATCHES, SEQUENCES, LENGTH = 2, 16, 64
PADDING = -100  # the label where there is none
optimizer = optax.adam(1e-2)

# Products of bfloat16 arrays. Without the keyword logits would be rounded to bfloat16, and losses to three digits.
matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


class LoRA(eqx.Module):
    """h · kernel + (h · a) · b. The kernel [d, n] is frozen; a and b are trained, in float32: steps are small."""

    kernel: jax.Array
    a: jax.Array
    b: jax.Array

    def __init__(self, d, n, key):
        of_kernel, of_a = jax.random.split(key)
        self.kernel = jax.random.normal(of_kernel, (d, n), jnp.bfloat16) / d**0.5
        self.a = jax.random.normal(of_a, (d, RANK)) / d**0.5
        self.b = jnp.zeros((RANK, n))

    def __call__(self, h):
        # In this order: kernel + a · b, a whole head, would be made in each step, and so would its gradient.
        a, b = (x.astype(h.dtype) for x in (self.a, self.b))
        return matmul(h, self.kernel) + matmul(h @ a, b)


class Model(eqx.Module):
    table: jax.Array
    layers: list[LoRA]
    head: LoRA

    def __init__(self, key):
        of_table, of_head, *keys = jax.random.split(key, 2 + LAYERS)
        self.table = jax.random.normal(of_table, (CLASSES, WIDTH), jnp.bfloat16)
        self.layers = [LoRA(WIDTH, WIDTH, key) for key in keys]
        self.head = LoRA(WIDTH, CLASSES, of_head)

    def __call__(self, words):
        """Hidden states [..., d]. Logits are the loss's matter, which calls the head for some tokens at a time."""
        h = self.table[words]
        for layer in self.layers:
            h += jax.nn.gelu(layer(h)).astype(h.dtype)
        return h


def split(model):
    """The model with each a and b alone, which are trained; and with the rest, which is frozen."""
    return eqx.partition(model, jax.tree.map_with_path(lambda path, _: path[-1].name in ("a", "b"), model))


def mean_and_gradient(trained, frozen, words, labels):
    """The mean loss in nats, of all tokens but padding, [micro-batch, sequence, place]; and its gradient."""
    kept = labels != PADDING

    def total(trained, words, labels, kept):
        model = eqx.combine(trained, frozen)
        return jce.linear_cross_entropy(labels, model(words), model.head, where=kept, reduction="sum")

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(total)(trained, *micro_batch)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
    sums, _ = jax.lax.scan(add, zeros, (words, labels, kept))
    # Divided once: in a mean of micro-batches' means a token would count the more, the more padding is around it.
    count = jnp.maximum(kept.sum(dtype=jnp.float32), 1)
    return jax.tree.map(lambda x: x / count, sums)


@eqx.filter_jit(donate="all-except-first")  # else what is trained would be in memory twice, before and after
def step(others, trained, state):
    """`others` are the arguments that a step leaves as they are."""
    frozen, words, labels = others
    loss, gradient = mean_and_gradient(trained, frozen, words, labels)
    updates, state = optimizer.update(gradient, state, trained)
    return eqx.apply_updates(trained, updates), state, loss


def batch(seed):
    """Words that count up from a random one, each with the next as label; and padding, from a random place on."""
    rng = np.random.default_rng(seed)
    start, length = rng.integers(0, LENGTH, (2, MICRO_BATCHES, SEQUENCES, 1))
    text = (start + np.arange(LENGTH + 1)) % LENGTH
    return text[..., :-1], np.where(np.arange(LENGTH) < length, text[..., 1:], PADDING)


def main(steps=40):
    trained, frozen = split(Model(jax.random.key(0)))
    state = optimizer.init(trained)
    for k in range(steps):
        trained, state, loss = step((frozen, *batch(k)), trained, state)
        if k % 5 == 0 or k == steps - 1:
            print(f"step {k}: {loss:.3f} nats", flush=True)


if __name__ == "__main__":
    main()
