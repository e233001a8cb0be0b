"""A train step for a language model in Flax NNX, to copy.

It has LoRA on frozen layers and on the head, padding, micro-batches and donated buffers. It needs flax and optax.
`python notebooks/examples/train_nnx.py` prints a falling loss, and takes some seconds on a CPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jce

CLASSES, WIDTH, LAYERS, RANK = 2048, 64, 2, 8
MICRO_BATCHES, SEQUENCES, LENGTH = 2, 16, 64
PADDING = -100  # the label of padding tokens

# A matmul of bfloat16 arrays with a float32 result. Without the keyword, logits would be rounded to bfloat16, and
# losses would be accurate to three digits only.
matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)


class LoRA(nnx.Module):
    """Computes h · kernel + (h · a) · b. The kernel, [d, n], is frozen, and a and b are trained.

    a and b are float32, because bfloat16 would lose small updates.
    """

    def __init__(self, d, n, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d, n), jnp.bfloat16) / d**0.5)
        self.a = nnx.LoRAParam(jax.random.normal(rngs.params(), (d, RANK)) / d**0.5)
        self.b = nnx.LoRAParam(jnp.zeros((RANK, n)))

    def __call__(self, h):
        # Not h · (kernel + a · b): each step would then compute kernel + a · b, an array of [d, n], and its gradient.
        a, b = (x[...].astype(h.dtype) for x in (self.a, self.b))
        return matmul(h, self.kernel[...]) + matmul(h @ a, b)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (CLASSES, WIDTH), jnp.bfloat16))
        self.layers = nnx.List(LoRA(WIDTH, WIDTH, rngs) for _ in range(LAYERS))
        self.head = LoRA(WIDTH, CLASSES, rngs)

    def __call__(self, words):
        """Returns hidden states, [..., d], and no logits. The loss calls the head for some tokens at a time."""
        h = self.table[...][words]
        for layer in self.layers:
            h += jax.nn.gelu(layer(h)).astype(h.dtype)
        return h


def mean_and_gradient(model, words, labels):
    """The mean loss over all tokens except padding, in nats, and its gradient.

    words and labels are [micro-batch, sequence, position].
    """
    kept = labels != PADDING
    graph, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def total(trained, words, labels, kept):
        model = nnx.merge(graph, trained, frozen)
        return jce.linear_cross_entropy(labels, model(words), model.head, where=kept, reduction="sum")

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, jax.value_and_grad(total)(trained, *micro_batch)), None

    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
    sums, _ = jax.lax.scan(add, zeros, (words, labels, kept))
    # Divide once, after the sum. In a mean of the micro-batches' means, tokens in a micro-batch with more padding would
    # weigh more.
    count = jnp.maximum(kept.sum(dtype=jnp.float32), 1)
    return jax.tree.map(lambda x: x / count, sums)


@nnx.jit(donate_argnames=("model", "optimizer"))  # otherwise memory would hold old and new ones
def step(model, optimizer, words, labels):
    loss, gradient = mean_and_gradient(model, words, labels)
    optimizer.update(model, gradient)
    return loss


def batch(seed):
    """Words that count up from a random one, the next words as labels, and padding from a random position on."""
    rng = np.random.default_rng(seed)
    start, length = rng.integers(0, LENGTH, (2, MICRO_BATCHES, SEQUENCES, 1))
    text = (start + np.arange(LENGTH + 1)) % LENGTH
    return text[..., :-1], np.where(np.arange(LENGTH) < length, text[..., 1:], PADDING)


def main(steps=40):
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    for k in range(steps):
        loss = step(model, optimizer, *batch(k))
        if k % 5 == 0 or k == steps - 1:
            print(f"step {k}: {loss:.3f} nats", flush=True)


if __name__ == "__main__":
    main()
