# %% [markdown]
# # Many devices: a head split over any mesh sends three numbers a token and each gradient once, and gathers nothing
#
# A head $W$ with a row for each of $n$ classes, and the hidden states $h$ of $N$ tokens, may both be too big for one
# device. On a mesh of $T \times K$ devices each has $N/T$ of the tokens and $n/K$ of the classes. The loss of a token,
#
# $$\log \frac{1}{q_y} = \log \sum_i e^{x_i - m} - (x_y - m) \qquad x = Wh \quad m = \max_i x_i$$
#
# needs three numbers that no device has alone: the maximum $m$, the sum, and the label's logit $x_y$. Its derivative
# $g = \partial \ell / \partial x$ needs no more of the others, since $q_i$ is $e^{x_i - m}$ over the sum. The gradients
# do: with a row of $h$ and $g$ for each token, that of $h$ is $gW$, a sum over classes, and that of $W$ is $g^\top h$,
# a sum over tokens. `jce.on_mesh(jce.linear_cross_entropy, ...)` sends just that. To see it takes several devices; a
# CPU can be eight.

# %%
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jce
from bench.devices import sent
from bench.hlo import collectives

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device
plt.rcParams.update({"font.size": 12, "figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
AXES = ("tokens", "classes")


def make_mesh(t, k):
    return jax.make_mesh((t, k), AXES, axis_types=(AxisType.Auto,) * 2)


def sharded_loss(mesh, **options):
    """The mean loss of (labels, hidden, head)."""
    cross_entropy = jce.on_mesh(jce.linear_cross_entropy, mesh=mesh, token_axis="tokens", class_axis="classes")
    return functools.partial(cross_entropy, **options)


print(len(jax.devices()), jax.devices()[0].platform, "devices")

# %% [markdown]
# ## The same numbers
#
# The first tokens are padding: 27 of 64, which `where` leaves out. On a mesh of 2 × 4 they all fall to the first four
# devices, so those have 5 tokens that count and the others 32. A mean of the two halves' means would weigh the 5 as
# much as the 32; the loss is the mean of all 37. It and its gradients are those of one device, to rounding, and the
# gradients stay split as their arguments are.

# %%
rng = np.random.default_rng(0)
N, d, n = 64, 16, 128
labels, where = rng.integers(0, n, N), np.arange(N) >= 27
hidden, head = (rng.standard_normal((k, d)).astype(np.float32) for k in (N, n))
mesh = make_mesh(2, 4)
arguments = [
    jax.device_put(x, NamedSharding(mesh, P(axis)))
    for x, axis in ((labels, "tokens"), (hidden, "tokens"), (head, "classes"))
]
one_device = jax.value_and_grad(lambda y, h, W: jce.linear_cross_entropy(y, h, W, where=where), (1, 2))
value, gradients = one_device(labels, hidden, head)
sharded_value, sharded_gradients = jax.jit(jax.value_and_grad(sharded_loss(mesh, where=where), (1, 2)))(*arguments)
value_error = abs(sharded_value / value - 1)
gradient_error = max(jnp.abs(a - b).max() / jnp.abs(b).max() for a, b in zip(sharded_gradients, gradients, strict=True))
halves = [jce.linear_cross_entropy(labels[i], hidden[i], head, where=where[i]) for i in (np.s_[:32], np.s_[32:])]
print(f"one device {value:.6f}, 2 × 4 devices {sharded_value:.6f}, mean of the halves' means {sum(halves) / 2:.6f}")
print(f"relative error: value {value_error:.0e}, gradients {gradient_error:.0e} of the largest entry")
print("the gradients are split as", *(g.sharding.spec for g in sharded_gradients))

# %% [markdown]
# ## What is sent
#
# The compiled program says so: each exchange between devices is an instruction in its text, inside the loop over chunks
# of tokens or outside. Compiling takes shapes alone, so the sizes can be real: $N = 8192$ tokens, $d = 512$ and
# $n = 32{,}768$ classes in float32. By the argument above, a device takes part in sums (or the maximum) over devices,
# each an *all-reduce*, of
#
# | over | numbers | when |
# |---|---|---|
# | the devices of the classes, if $K > 1$ | $3 N/T$ | in the loop |
# | the devices of the classes, if $K > 1$ | $N/T \cdot d$, the gradient of $h$ | once |
# | the devices of the tokens, if $T > 1$ | $n/K \cdot d$, the gradient of $W$ | once |
# | the devices of the tokens, if $T > 1$ | 1, the loss | once |
#
# `bench.devices.sent` is this table, but for the loss; `bench.hlo.collectives` reads a program's text. Beside it is
# what XLA's partitioner makes of the loss of whole logits, split the same way.

# %%
TOKENS, WIDTH, CLASSES, CHUNK = 8192, 512, 32_768, 256
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def dense_loss(labels, hidden, head):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, labels).mean()


def gradient(loss):
    return jax.value_and_grad(loss, (1, 2))


def hvp(loss):
    """The Hessian in (hidden, head) times a direction."""

    def product(labels, hidden, head, *direction):
        return jax.jvp(lambda *a: jax.grad(loss, (1, 2))(labels, *a), (hidden, head), direction)[1]

    return product


def compiled(mode, loss, mesh):
    def array(shape, axis, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(axis)))

    labels = array((TOKENS,), "tokens", jnp.int32)
    a = array((TOKENS, WIDTH), "tokens"), array((CLASSES, WIDTH), "classes")
    return jax.jit(mode(loss)).lower(labels, *a, *(a if mode is hvp else ())).compile()


def readable(found):
    kinds = Counter(found).items()
    return ", ".join(f"{k} × {c.kind} of {c.size:,}{' in the loop' if c.in_loop else ''}" for c, k in kinds)


exchanges, temporaries = {}, {}
for shape in MESHES:
    mesh = make_mesh(*shape)
    for name, loss in {"jce": sharded_loss(mesh, chunk_size=CHUNK), "dense": dense_loss}.items():
        for mode in (gradient, hvp):
            program = compiled(mode, loss, mesh)
            exchanges[shape, name, mode] = collectives(program.as_text())
            temporaries[shape, name, mode] = program.memory_analysis().temp_size_in_bytes / 1e6
for name in ("jce", "dense"):
    print(f"{name}, value and gradient")
    for t, k in MESHES:
        print(f"  {t} × {k}: {readable(exchanges[(t, k), name, gradient])}")
for name in ("jce", "dense"):
    print(f"{name}, Hessian-vector product\n  2 × 4: {readable(exchanges[(2, 4), name, hvp])}")

# %% [markdown]
# A chunk is 256 tokens, and the loop runs $N/T/256$ times. The partitioner's program has no loop and sends as much;
# what the split head saves beside it is memory. In a Hessian-vector product it saves half of what is sent as well: the
# partitioner adds up each gradient's tangent in two parts, jce in one, with 7 numbers a token in the loop.
#
# Now in megabytes: what a device adds up with others in a step, and what it needs beside arguments and results. (In a
# ring of $p$ devices, to add up a byte each of them sends $2(p-1)/p$ bytes.)


# %%
def numbers(shape, name, mode):
    """How many numbers a device adds up with others': in the loop, and once."""
    found, trips = exchanges[shape, name, mode], TOKENS // shape[0] // CHUNK
    return trips * sum(c.size for c in found if c.in_loop), sum(c.size for c in found if not c.in_loop)


figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
bars = {
    ("jce", gradient): ("jce, value and gradient", "#0072B2", ""),
    ("dense", gradient): ("dense, value and gradient", "#D55E00", ""),
    ("jce", hvp): ("jce, Hessian-vector product", "#56B4E9", "//"),
    ("dense", hvp): ("dense, Hessian-vector product", "#E69F00", "//"),
}
for i, ((name, mode), (label, colour, hatch)) in enumerate(bars.items()):
    style = {"width": 0.19, "color": colour, "hatch": hatch, "edgecolor": "white", "label": label}
    at = np.arange(len(MESHES)) + 0.2 * (i - 1.5)
    axes[0].bar(at, [4e-6 * sum(numbers(shape, name, mode)) for shape in MESHES], **style)
    axes[1].bar(at, [temporaries[shape, name, mode] for shape in MESHES], **style)
axes[0].set_ylabel("MB added up with other devices")
axes[1].set_ylabel("MB of temporaries on a device")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
for axis in axes:
    axis.set_xlabel("mesh: tokens × classes")
    axis.set_xticks(range(len(MESHES)), [f"{t} × {k}" for t, k in MESHES])

# %% [markdown]
# ## Logits that are there already
#
# Functions of logits need no call of their own. Under `jax.jit` the logits may be split over rows, classes or both, and
# the partitioner sends some numbers a row. Inside `jax.shard_map`, where a function sees its device's block alone,
# `axis_name` names the mesh axis of the classes, and jce's rules say what to send: no more numbers, or fewer. Here are
# 64 rows of 8192 classes on 2 × 4 devices, so 32 rows a device; value and gradient, counted in numbers a row.

# %%
rows, n = 64, 8192
mesh = make_mesh(2, 4)
block, row = P("tokens", "classes"), P("tokens")
x, z = (jax.device_put(3 * jax.random.normal(jax.random.key(k), (rows, n)), NamedSharding(mesh, block)) for k in (0, 1))
y = jax.device_put(rng.integers(0, n, rows), NamedSharding(mesh, row))
cases = {
    jce.entropy_with_logits: (x,),
    jce.kl_divergence_with_logits: (z, x),
    jce.cross_entropy_with_integer_labels: (y, x),
}


def with_gradient(function, *arguments):
    """Compiled for the arguments: value and gradient in the last of them."""
    program = jax.jit(jax.value_and_grad(lambda *a: function(*a).sum(), len(arguments) - 1))
    return program.lower(*arguments).compile()


row_exchanges, logit_errors = [], []
for function, a in cases.items():
    split = jax.shard_map(
        lambda *a, function=function: function(*a, axis_name="classes"),
        mesh=mesh,
        in_specs=tuple(array.sharding.spec for array in a),
        out_specs=row,
    )
    whole = [np.asarray(array) for array in a]
    expected = with_gradient(function, *whole)(*whole)
    for how, of_split_logits in {"jit": function, "shard_map": split}.items():
        program = with_gradient(of_split_logits, *a)
        found = [c for c in collectives(program.as_text()) if c.size > 1]  # but the sum over all rows
        row_exchanges += found
        for got, want in zip(program(*a), expected, strict=True):
            logit_errors.append(np.abs(got - want).max() / np.abs(want).max())
        print(f"{function.__name__:34}{how:>10}{sum(c.size for c in found) // (rows // 2):4} numbers a row")
print(f"largest error {max(logit_errors):.0e}")

# %% [markdown]
# ## The claim
#
# On each mesh: all that is exchanged are sums and maxima, of the sizes of the table and no others; three numbers a
# token in the loop. In a Hessian-vector product they are more numbers a token, and still each gradient's tangent once.

# %%
for shape in MESHES:
    expected = sent(TOKENS, WIDTH, CLASSES, *shape)
    for mode in (gradient, hvp):
        found = exchanges[shape, "jce", mode]
        assert {c.kind for c in found} == {"all-reduce"}
        once = [c.size for c in found if not c.in_loop and c.size > 1]
        assert sorted(once) == sorted(size for size in (expected.hidden, expected.head) if size), (shape, mode)
    in_loop, _ = numbers(shape, "jce", gradient)
    assert in_loop == expected.in_loop == (3 * TOKENS // shape[0] if shape[1] > 1 else 0), shape
    for mode, most in ((gradient, 1.01), (hvp, 0.6)):
        assert sum(numbers(shape, "jce", mode)) <= most * sum(numbers(shape, "dense", mode)), (shape, mode)
        assert temporaries[shape, "jce", mode] < temporaries[shape, "dense", mode] / 2, (shape, mode)
assert max(value_error, gradient_error) < 1e-5
assert {(c.kind, c.size) for c in row_exchanges} == {("all-reduce", rows // 2)}
assert max(logit_errors) < 1e-5
ratio = max(temporaries[shape, "dense", gradient] / temporaries[shape, "jce", gradient] for shape in MESHES)
print(
    f"on {', '.join(f'{t} × {k}' for t, k in MESHES)} devices three numbers a token (where classes are split) and each"
    f" gradient once are sent, nothing is gathered, and temporaries are up to {ratio:.0f} times below the dense loss's"
)
