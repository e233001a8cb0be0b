# %% [markdown]
# # Many devices: on any mesh, a split head sends three numbers per token and each gradient once, and gathers nothing
#
# A head $W$ with one row for each of $n$ classes, and the hidden states $h$ of $N$ tokens, may both be too big for one
# device. On a mesh of $T \times K$ devices, each device has $N/T$ of the tokens and $n/K$ of the classes. The loss of a
# token,
#
# $$\log \frac{1}{q_y} = \log \sum_i e^{x_i - m} - (x_y - m) \qquad x = Wh \quad m = \max_i x_i$$
#
# needs three numbers that no device has alone: the maximum $m$, the sum, and the label's logit $x_y$. Its derivative
# $g = \partial \ell / \partial x$ needs nothing more from other devices, because $q_i$ is $e^{x_i - m}$ divided by the
# sum. The gradients need more. If $h$ and $g$ have one row per token, the gradient with respect to $h$ is $gW$, a sum
# over classes, and the gradient with respect to $W$ is $g^\top h$, a sum over tokens.
# `jce.on_mesh(jce.linear_cross_entropy, ...)` sends exactly these numbers. To see this you need several devices; a CPU
# can act as eight.

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

jax.config.update("jax_num_cpu_devices", 8)  # before JAX starts its devices
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
# The first 27 of the 64 tokens are padding, which `where` masks. On a mesh of 2 × 4 all of the padding is on the first
# four devices. They have 5 unmasked tokens, and the other four have 32. The mean of the two halves' means would give
# the 5 tokens as much weight as the 32. The sharded loss is the mean over all 37 tokens. The loss and its gradients
# equal those from one device, up to rounding, and the gradients stay split in the same way as their arguments.

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
# The text of the compiled program shows what is sent. Each exchange between devices is an instruction, inside or
# outside the loop over chunks of tokens. Compilation needs only shapes, so the sizes can be realistic: $N = 8192$
# tokens, $d = 512$ and $n = 32{,}768$ classes in float32. By the argument above, a device takes part in these sums (or
# the maximum) over devices. Each is an *all-reduce*:
#
# | over | numbers | when |
# |---|---|---|
# | the devices of the classes, if $K > 1$ | $3 N/T$ | in the loop |
# | the devices of the classes, if $K > 1$ | $N/T \cdot d$, the gradient of $h$ | once |
# | the devices of the tokens, if $T > 1$ | $n/K \cdot d$, the gradient of $W$ | once |
# | the devices of the tokens, if $T > 1$ | 1, the loss | once |
#
# `bench.devices.sent` returns this table, except for the loss. `bench.hlo.collectives` reads a program's text. For
# comparison, we let XLA's partitioner split a loss that computes all logits at once in the same way.

# %%
TOKENS, WIDTH, CLASSES, CHUNK = 8192, 512, 32_768, 256
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


def dense_loss(labels, hidden, head):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, labels).mean()


def gradient(loss):
    return jax.value_and_grad(loss, (1, 2))


def hvp(loss):
    """The Hessian with respect to (hidden, head), times a direction."""

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
# A chunk has 256 tokens, and the loop runs $N/T/256$ times. For value and gradient, the partitioner's program has no
# loop and sends just as many numbers as jce's, so jce saves only memory. For a Hessian-vector product, jce also sends
# about half as many numbers: for each of the two gradients, the partitioner's program adds up two arrays of the
# gradient's size over the devices, and jce's program adds up one. In its loop, jce then sends 7 numbers per token
# instead of 3.
#
# The pictures show megabytes per step: the size of all arrays that a device adds up with other devices, and the
# temporary memory that it needs beyond arguments and results. (To add up an array in a ring all-reduce over $p$
# devices, each device sends $2(p-1)/p$ times the array's size.)


# %%
#| fig-alt: Bars by mesh: jce adds up as much as dense, or half for Hessian products, and needs less memory
def numbers(shape, name, mode):
    """How many numbers a device adds up with other devices: in the loop, and outside the loop."""
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
# ## Logits that exist already
#
# Functions of logits need no special call. Under `jax.jit` the logits may be split over rows, classes or both, and the
# partitioner sends a few numbers per row. Inside `jax.shard_map` a function sees only its device's block. There,
# `axis_name` names the mesh axis of the classes, and jce's rules determine what is sent: as many numbers or fewer. The
# example has 64 rows of 8,192 classes on 2 × 4 devices, so each device has 32 rows. It counts the numbers per row for
# value and gradient.

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
    """The compiled value and gradient with respect to the last argument."""
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
        found = [c for c in collectives(program.as_text()) if c.size > 1]  # except the sum over all rows
        row_exchanges += found
        for got, want in zip(program(*a), expected, strict=True):
            logit_errors.append(np.abs(got - want).max() / np.abs(want).max())
        print(f"{function.__name__:34}{how:>10}{sum(c.size for c in found) // (rows // 2):4} numbers per row")
print(f"largest error {max(logit_errors):.0e}")

# %% [markdown]
# ## The claim
#
# On each mesh, the only exchanges are sums and maxima, and only of the sizes in the table: in the loop, three numbers
# per token. A Hessian-vector product exchanges more numbers per token, and still the tangent of each gradient only
# once.

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
    f"on {', '.join(f'{t} × {k}' for t, k in MESHES)} devices three numbers per token (if classes are split) and each"
    f" gradient once are sent, nothing is gathered, and temporaries are up to {ratio:.0f} times smaller than for the"
    " dense loss"
)
