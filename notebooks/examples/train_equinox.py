"""A train step for a language model in Equinox, to copy.

It has LoRA on frozen layers and on the head, padding, micro-batches and donated buffers. It needs equinox and optax.
`python notebooks/examples/train_equinox.py` prints a falling loss, and takes some seconds on a CPU.
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
PADDING = -100  # the label of padding tokens
optimizer = optax.adam(1e-2)

# A matmul of bfloat16 arrays with a float32 result. Without the keyword, logits would be rounded to bfloat16, and
# losses would be accurate to three digits only.
matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


class LoRA(eqx.Module):
    """Computes h · kernel + (h · a) · b. The kernel, [d, n], is frozen, and a and b are trained.

    a and b are float32, because bfloat16 would lose small updates.
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array

    def __init__(self, d, n, key):
        of_kernel, of_a = jax.random.split(key)
        self.kernel = jax.random.normal(of_kernel, (d, n), jnp.bfloat16) / d**0.5
        self.a = jax.random.normal(of_a, (d, RANK)) / d**0.5
        self.b = jnp.zeros((RANK, n))

    def __call__(self, h):
        # Not h · (kernel + a · b): each step would then compute kernel + a · b, an array of [d, n], and its gradient.
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
        """Returns hidden states, [..., d], and no logits. The loss calls the head for some tokens at a time."""
        h = self.table[words]
        for layer in self.layers:
            h += jax.nn.gelu(layer(h)).astype(h.dtype)
        return h


def split(model):
    """The trained part of the model (each a and b), and the frozen part (the rest)."""
    return eqx.partition(model, jax.tree.map_with_path(lambda path, _: path[-1].name in ("a", "b"), model))


def mean_and_gradient(trained, frozen, words, labels):
    """The mean loss over all tokens except padding, in nats, and its gradient.

    words and labels are [micro-batch, sequence, position].
    """
    kept = labels != PADDING

    def total(trained, words, labels, kept):
        model = eqx.combine(trained, frozen)
        return jce.linear_cross_entropy(labels, model(words), model.head, where=kept, reduction="sum")

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(total)(trained, *micro_batch)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
    sums, _ = jax.lax.scan(add, zeros, (words, labels, kept))
    # Divide once, after the sum. In a mean of the micro-batches' means, tokens in a micro-batch with more padding would
    # weigh more.
    count = jnp.maximum(kept.sum(dtype=jnp.float32), 1)
    return jax.tree.map(lambda x: x / count, sums)


@eqx.filter_jit(donate="all-except-first")  # otherwise memory would hold old and new parameters
def step(others, trained, state):
    """`others` are the arguments that are not donated."""
    frozen, words, labels = others
    loss, gradient = mean_and_gradient(trained, frozen, words, labels)
    updates, state = optimizer.update(gradient, state, trained)
    return eqx.apply_updates(trained, updates), state, loss


def batch(seed):
    """Words that count up from a random one, the next words as labels, and padding from a random position on."""
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
