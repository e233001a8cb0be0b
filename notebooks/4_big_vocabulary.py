# %% [markdown]
# # A big vocabulary: the temporary memory need not grow with the number of tokens
#
# A language model ends in a *head*: a matrix $W$ of $n \times d$ weights. It turns a token's hidden state $h$ into $n$
# logits $x = Wh$, one for each class. The loss is the mean over the tokens of
#
# $$\log \frac{1}{q_y} \qquad q = \mathrm{softmax}(x)$$
#
# where $y$ is the label. Evaluated as written, the loss needs the logits of all tokens at once. That is tokens × $n$
# numbers: 34 GB in float32 at 65,536 tokens and 131,072 classes. `jce.linear_cross_entropy(labels, hidden, head)`
# returns the same number, but computes the logits of one chunk of tokens at a time, in every mode of differentiation.
# This notebook compares its memory and time with those of the dense loss. Then it uses the Hessian-vector product of
# the loss to measure how sharp the loss is.

# %%
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.sparse.linalg import LinearOperator, eigsh

import jce

plt.rcParams.update({"font.size": 12, "figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"


def dense_loss(labels, hidden, head):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, labels).mean()


def value(loss, labels, a, t):
    return loss(labels, *a)


def gradient(loss, labels, a, t):
    return jax.value_and_grad(loss, (1, 2))(labels, *a)


def hvp(loss, labels, a, t):
    """The Hessian at a = (hidden, head) times the direction t."""
    return jax.jvp(lambda *a: jax.grad(loss, (1, 2))(labels, *a), a, t)[1]


MODES = {"value": value, "value and gradient": gradient, "Hessian-vector product": hvp}

# %% [markdown]
# ## Memory
#
# A compiled program needs memory beyond its arguments and results, for its *temporaries*. XLA reports their size after
# compilation. The program doesn't have to run, and its arguments can be shapes without data. So a small machine can
# measure the sizes of a real model. We vary one size at a time: the number of tokens, the number of tokens in a chunk
# (`chunk_size`) and the number of classes $n$.

# %%
WIDTH, TOKENS, CLASSES, CHUNK = 1024, 2**16, 2**17, 2**9


def temporaries(mode, tokens, n, chunk):
    """In gigabytes; the dense loss has no chunk."""
    loss = functools.partial(jce.linear_cross_entropy, chunk_size=chunk) if chunk else dense_loss
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    a = tuple(jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32) for rows in (tokens, n))
    program = jax.jit(functools.partial(MODES[mode], loss)).lower(labels, a, a)
    return program.compile().memory_analysis().temp_size_in_bytes / 1e9


some_tokens, some_chunks = (2**10, 2**13, TOKENS), (2**6, CHUNK, 2**12)
settings = [(tokens, CLASSES, None) for tokens in some_tokens]
settings += [(tokens, CLASSES, CHUNK) for tokens in some_tokens]
settings += [(TOKENS, CLASSES, chunk) for chunk in some_chunks if chunk != CHUNK]
settings += [(TOKENS, CLASSES // 8, CHUNK)]
gigabytes = {(mode, *sizes): temporaries(mode, *sizes) for sizes in settings for mode in MODES}
print(f"temporaries in GB, d = {WIDTH}\n{'tokens':>9}{'classes':>10}{'chunk':>8}" + "".join(f"{m:>25}" for m in MODES))
for tokens, n, chunk in settings:
    row = "".join(f"{gigabytes[mode, tokens, n, chunk]:25.2f}" for mode in MODES)
    print(f"{tokens:9,}{n:10,}{chunk or 'dense':>8}{row}")

# %% [markdown]
# The dense loss keeps arrays of tokens × $n$: one for the value, two with the gradient, three for the Hessian-vector
# product. For the value, jce keeps one array of chunk × $n$. With the gradient, it also keeps the sum of
# the head's gradient ($n \times d$). The Hessian-vector product keeps a few arrays of these two shapes, and arrays of
# tokens × $d$ (the size of the hidden states). The latter grow with the tokens, which shows when $n$ is small. With few
# tokens there is little to save: at 1,024 tokens the dense Hessian-vector product needs less memory than jce's.

# %%
#| fig-alt: Memory in log-log plots: the dense loss's grows with the tokens; jce's doesn't, but grows with the chunk
STYLES = dict(zip(MODES, (("-", "o"), ("--", "s"), (":", "^")), strict=True))
figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.8), sharey=True, layout="constrained")
for mode, (line, marker) in STYLES.items():
    style = {"linestyle": line, "marker": marker, "linewidth": 2}
    dense, ours = ([gigabytes[mode, tokens, CLASSES, chunk] for tokens in some_tokens] for chunk in (None, CHUNK))
    axes[0].loglog(some_tokens, dense, color=RED, **style)
    axes[0].loglog(some_tokens, ours, color=BLUE, **style)
    axes[1].axhline(dense[-1], color=RED, linestyle=line, linewidth=2)
    by_chunk = [gigabytes[mode, TOKENS, CLASSES, chunk] for chunk in some_chunks]
    axes[1].loglog(some_chunks, by_chunk, color=BLUE, label=mode, **style)
axes[0].text(2.2e3, 12, "dense", color=RED, rotation=32)
axes[0].text(some_tokens[-1], 0.1, "jce, chunks of 512", color=BLUE, ha="right")
axes[1].text(some_chunks[0], 15, "dense, all tokens at once", color=RED)
axes[1].text(some_chunks[1], 0.1, "jce", color=BLUE)
axes[0].set(xlabel="tokens", ylabel="temporaries in GB", title="131,072 classes")
axes[1].set(xlabel="tokens in a chunk", title="65,536 tokens, 131,072 classes")
figure.legend(loc="outside lower center", ncols=3, frameon=False)
for axis, sizes in zip(axes, (some_tokens, some_chunks), strict=True):
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()

# %% [markdown]
# ## Time
#
# Let the hidden states of all tokens be the rows of $h$. Value and gradient then take three matmuls of tokens · $d$ ·
# $n$ multiplications each: the logits $x = hW^\top$ and, with $g = \partial \ell / \partial x$, the gradients $gW$ and
# $g^\top h$. Each chunk computes $g$ from its logits while they are in memory, so no logits are computed twice.
# But every chunk reads the head and adds to the head's gradient, and small chunks do this often.
#
# We time several chunk sizes and the bare matmuls in turn, so that other load on the machine slows all of them alike,
# and take medians. A ratio can be below 1, because the bare matmuls write the logits of all tokens to memory. Times
# depend on the machine, so this notebook doesn't assert them. The next picture shows them.

# %%
tokens, d, n = 2048, 128, 4096
rng = np.random.default_rng(0)
labels = rng.integers(0, n, tokens)
a = hidden, head = tuple(jnp.asarray(rng.standard_normal((k, d)), jnp.float32) for k in (tokens, n))


def products(hidden, head):
    x = hidden @ head.T
    return x @ head, x.T @ hidden


chunks = (16, 64, 256, 1024, 2048)
programs = {"three matmuls": jax.jit(products)}
for chunk in chunks:
    loss = functools.partial(jce.linear_cross_entropy, labels, chunk_size=chunk)
    programs[chunk] = jax.jit(jax.value_and_grad(loss, (0, 1)))
seconds = {name: [] for name in programs}
for repetition in range(8):
    for name, program in programs.items():
        start = time.perf_counter()
        jax.block_until_ready(program(*a))
        if repetition:  # the first one compiles
            seconds[name].append(time.perf_counter() - start)
medians = {name: statistics.median(s) for name, s in seconds.items()}
relative = {chunk: medians[chunk] / medians["three matmuls"] for chunk in chunks}
print("time divided by that of three matmuls, by chunk:", {chunk: round(r, 2) for chunk, r in relative.items()})

# %% [markdown]
# ## The eigenvalues of a Hessian
#
# Lanczos' method finds the largest eigenvalues of a symmetric matrix, and all that it needs is matrix-vector products.
# `scipy.sparse.linalg.eigsh` is such a method, with restarts. The Hessian of the loss in $W$ has $nd$ rows. For $N$
# tokens it is a mean of Kronecker products,
#
# $$\nabla^2 = \frac{1}{N} \sum_{t=1}^{N} \left(\mathrm{diag}\, q_t - q_t q_t^\top\right) \otimes h_t h_t^\top$$
#
# For 50 classes and $d = 16$ this matrix is small enough to be formed in float64, as a reference. The Hessian-vector
# products are in float32, and use chunks of 64 of the 256 tokens.


# %%
def top_eigenvalues(count, labels, hidden, head, bias=None, **options):
    """The largest `count` eigenvalues of the loss's Hessian with respect to the head, in descending order.

    Also returns the number of Hessian-vector products used.
    """
    slope = jax.grad(lambda head: jce.linear_cross_entropy(labels, hidden, head, bias, **options))
    product = jax.jit(lambda v: jax.jvp(slope, (head,), (v.reshape(head.shape),))[1].ravel())
    used = []

    def counted(v):
        used.append(1)
        return np.asarray(product(v))

    operator = LinearOperator((head.size, head.size), matvec=counted, dtype=np.float32)
    start = np.random.default_rng(1).standard_normal(head.size).astype(np.float32)
    return eigsh(operator, count, v0=start, tol=1e-6, return_eigenvectors=False)[::-1], len(used)


tokens, d, n = 256, 16, 50
labels, hidden, head = rng.integers(0, n, tokens), rng.standard_normal((tokens, d)), rng.standard_normal((n, d))
found, used = top_eigenvalues(6, labels, jnp.asarray(hidden), jnp.asarray(head), chunk_size=64)
q = np.exp(hidden @ head.T)
q /= q.sum(1, keepdims=True)
covariances = np.eye(n) * q[:, None] - q[:, :, None] * q[:, None]
hessian = np.einsum("tij,ta,tb->iajb", covariances, hidden, hidden, optimize=True).reshape(n * d, n * d) / tokens
exact = np.linalg.eigvalsh(hessian)[: -len(found) - 1 : -1]
small_error = np.abs(found / exact - 1).max()
print(f"by {used} Hessian-vector products: {np.round(found, 6)}")
print(f"from the whole matrix:         {np.round(exact, 6)}")
print(f"largest relative error {small_error:.1e}")

# %% [markdown]
# At 1,000 classes and $d = 64$ the Hessian of the 64,000 weights would take 16 GB. At some weights, however, its
# spectrum is known: when the head has learned how frequent each class is and nothing else, that is, $W = 0$ with a bias
# of $\log f$. At these weights every $q_t$ is $f$, and the eigenvalues of
#
# $$\nabla^2 = \left(\mathrm{diag}\, f - f f^\top\right) \otimes C \qquad C = \frac{1}{N} \sum_t h_t h_t^\top$$
#
# are the products of the eigenvalues of its two factors (Horn and Johnson, *Topics in Matrix Analysis*, theorem
# 4.2.12). As class frequencies, we take Zipf's law for words: $f_i \propto 1/i$. The loss is sharp in the directions
# of frequent words. The largest eigenvalue is therefore much larger than that for a uniform $f$. The largest stable
# step of gradient descent, which is $2/\lambda_{\max}$ for a quadratic, is smaller by the same factor.

# %%
#| fig-alt: Left: time is least with 256-token chunks, equal to three matmuls; right: eigenvalues match known ones
tokens, d, n = 1024, 64, 1000
f = 1 / np.arange(1, n + 1)
f /= f.sum()
labels = rng.choice(n, tokens, p=f)
hidden = jnp.asarray(rng.standard_normal((tokens, d)) / np.sqrt(np.arange(1, d + 1)), jnp.float32)
spectrum, used = top_eigenvalues(12, labels, hidden, jnp.zeros((n, d)), jnp.asarray(np.log(f)), chunk_size=256)
of_classes = np.linalg.eigvalsh(np.diag(f) - np.outer(f, f))
h = np.asarray(hidden, np.float64)
of_states = np.linalg.eigvalsh(h.T @ h / tokens)
known = np.sort(np.outer(of_classes, of_states).ravel())[: -len(spectrum) - 1 : -1]
large_error = np.abs(spectrum / known - 1).max()
print(f"{len(spectrum)} eigenvalues of {n * d:,} by {used} such products, largest relative error {large_error:.1e}")
print(f"the largest is {spectrum[0] / (of_states.max() / n):.0f} times that for a uniform f")

figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.2), layout="constrained")
axes[0].semilogx(chunks, list(relative.values()), "o-", color=BLUE, linewidth=2, label="value and gradient")
axes[0].axhline(1, color=RED, linestyle="--", linewidth=2, label="three matmuls")
axes[0].set(xlabel="tokens in a chunk, of 2048", ylabel="time / time of the matmuls", title="time", ylim=(0, None))
rank = np.arange(1, len(spectrum) + 1)
axes[1].plot(rank, known, "s", color=GREEN, markersize=11, fillstyle="none", label="products of eigenvalues")
axes[1].plot(rank, spectrum, "o", color=BLUE, label="by Hessian-vector products")
axes[1].set(xlabel="rank", ylabel="eigenvalue", title="the Hessian for 64,000 weights", ylim=(0, None))
axes[0].set_xticks(chunks, chunks)
axes[0].minorticks_off()
for axis in axes:
    axis.legend(frameon=False)

# %% [markdown]
# ## Why jce has a rule for forward mode
#
# A loss is often fused with `jax.custom_vjp`: its forward pass also prepares the backward pass. Such a function has no
# forward mode. JAX rejects its Hessian-vector product (forward over reverse, as above) if its forward rule calls the
# function itself, as that of `fused` does below. jce's rules are `jax.custom_jvp`, from which JAX derives both modes,
# to any order.


# %%
@jax.custom_vjp
def fused(x):
    return jax.nn.logsumexp(x)


fused.defvjp(lambda x: (fused(x), jax.nn.softmax(x)), lambda q, cotangent: (cotangent * q,))
x = jnp.arange(3.0)
refusals = []
for name, function in {"fused": fused, "its gradient": jax.grad(fused)}.items():
    try:
        jax.jvp(function, (x,), (x,))
    except TypeError as error:
        refusals.append(f"{name}: {str(error).splitlines()[0]}")
print("\n".join(refusals))

# %% [markdown]
# ## The claim
#
# The memory is asserted in bytes of the compiled programs. The derivatives are asserted by eigenvalues, which only
# correct Hessian-vector products give.

# %%
few, many = some_tokens[0], some_tokens[-1]
growth, less = {}, {}
for mode in MODES:
    growth[mode] = gigabytes[mode, many, CLASSES, CHUNK] / gigabytes[mode, few, CLASSES, CHUNK]
    less[mode] = gigabytes[mode, many, CLASSES, None] / gigabytes[mode, many, CLASSES, CHUNK]
    assert gigabytes[mode, many, CLASSES, None] > 0.9 * many / few * gigabytes[mode, few, CLASSES, None], mode
assert max(growth.values()) < 1.05, growth
assert min(less.values()) > 40, less
assert len(refusals) == 2
assert small_error < 1e-4, small_error
assert large_error < 1e-4, large_error
print(
    f"{many // few} times the tokens: {max(growth.values()):.2f} times the memory; at {many:,} tokens and {CLASSES:,}"
    f" classes {', '.join(f'{r:.0f}' for r in less.values())} times less than the dense loss for"
    f" {', '.join(MODES)}; eigenvalues have errors of at most {max(small_error, large_error):.0e}"
)
