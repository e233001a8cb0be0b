# %% [markdown]
# # Conventions: each line of the mathematics is a line of code, and stays true at every zero and infinity
#
# We consider two discrete distributions over $n$ classes, $p = \{p_1, \dots, p_n\}$ and $q = \{q_1, \dots, q_n\}$, with
# $0 \le p_i, q_i \le 1$ and $\sum p_i = \sum q_i = 1$. The target is $p$ and the model is $q$, and the target comes
# first. All results are in nats.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.scipy.special import entr, rel_entr, xlogy

import jce

p = jnp.array([0.5, 0.25, 0.25])
q = jnp.array([0.25, 0.25, 0.5])
jce.check_distribution(jnp.stack([p, q]))

# %% [markdown]
# ## The definitions
#
# $$H(p) = \sum_i p_i \log \frac{1}{p_i} \qquad H(p, q) = \sum_i p_i \log \frac{1}{q_i} \qquad
# \mathrm{KL}(p \Vert q) = \sum_i p_i \log \frac{p_i}{q_i}$$

# %%
print("H(p)     ", jce.entropy(p), "=", (p * jnp.log(1 / p)).sum())
print("H(p, q)  ", jce.cross_entropy(p, q), "=", (p * jnp.log(1 / q)).sum())
print("KL(p‖q)  ", jce.kl_divergence(p, q), "=", (p * jnp.log(p / q)).sum())

# %% [markdown]
# $\mathrm{KL}(p \Vert q) = H(p, q) - H(p) \ge 0$, so $H(p, q) \ge H(p) \ge 0$. Neither is symmetric:
# $H(p, q) \ne H(q, p)$ and $\mathrm{KL}(p \Vert q) \ne \mathrm{KL}(q \Vert p)$. Both have the same minimizer over $q$,
# because they differ by $H(p)$, which doesn't depend on $q$. The minimizer is $q = p$, where $\mathrm{KL} = 0$ and
# $H(p, q) = H(p)$.

# %%
r = jnp.array([0.75, 0.125, 0.125])
assert jnp.allclose(jce.kl_divergence(p, q), jce.cross_entropy(p, q) - jce.entropy(p))
assert jce.cross_entropy(p, r) != jce.cross_entropy(r, p)
assert jce.kl_divergence(p, r) != jce.kl_divergence(r, p)

others = jax.random.dirichlet(jax.random.key(0), jnp.ones(3), (100_000,))
assert (jce.cross_entropy(p, others) >= jce.cross_entropy(p, p)).all()
assert (jce.generalized_kl_divergence(p, others) >= jce.generalized_kl_divergence(p, p)).all()
assert jce.kl_divergence(p, p) == 0
assert jce.cross_entropy(p, p) == jce.entropy(p)
print("the best of 100,000 others:", others[jce.cross_entropy(p, others).argmin()], "for p =", p)

# %% [markdown]
# ## The gradient
#
# $$\frac{\partial}{\partial q_e} H(p, q) = -\frac{\partial}{\partial q_e} \sum_i p_i \log q_i = -\frac{p_e}{q_e}$$
#
# for each of the $n$ classes. The gradient of KL is the same. If $q = \mathrm{softmax}(z)$, the quotient disappears:
# $\partial H / \partial z_e = q_e - p_e$.

# %%
print("∇q H ", jax.grad(jce.cross_entropy, 1)(p, q), "=", -p / q)
print("∇q KL", jax.grad(jce.kl_divergence, 1)(p, q))
z = jnp.log(q)
print("∇z H ", jax.grad(jce.cross_entropy_with_logits, 1)(p, z), "=", q - p)

# %% [markdown]
# ## The binary case
#
# With $p = \{\alpha, 1 - \alpha\}$ and $q = \{\beta, 1 - \beta\}$,
#
# $$H(p, q) = \alpha \log \frac{1}{\beta} + (1 - \alpha) \log \frac{1}{1 - \beta} \qquad
# \frac{\partial H}{\partial \beta} = -\frac{\alpha}{\beta} + \frac{1 - \alpha}{1 - \beta}
# = \frac{\beta - \alpha}{\beta (1 - \beta)}$$

# %%
alpha, beta = 0.5, 0.25
print("H(α, β)", jce.binary_cross_entropy(alpha, beta), "=", -alpha * np.log(beta) - (1 - alpha) * np.log(1 - beta))
print("∂H/∂β  ", jax.grad(jce.binary_cross_entropy, 1)(alpha, beta), "=", (beta - alpha) / (beta * (1 - beta)))

# %% [markdown]
# ## Zeros and infinities
#
# The conditions $0 \le p_i$ and $0 \le q_i$ allow zeros, but the formulas don't: at a zero they contain
# $0 \cdot \log 0$ or $0/0$. The intended result is the limit of the value and of the derivative, taken from inside the
# domain. The table compares these limits, worked out manually, with the results of JAX's own functions for these terms
# and of jce.

# %%
inf = np.inf


def plain_entropy(p):
    return entr(p).sum()


def plain_cross_entropy(p, q):
    return -xlogy(p, q).sum()


def plain_kl(p, q):
    return rel_entr(p, q).sum()


def plain_logits(p, z):
    return -(p * jax.nn.log_softmax(z)).sum()


def plain_binary(a, b):
    return -(xlogy(a, b) + xlogy(1 - a, 1 - b))


def plain_binary_logits(a, x):
    return -(a * jax.nn.log_sigmoid(x) + (1 - a) * jax.nn.log_sigmoid(-x))


CASES = [  # a name, plain JAX, jce, the arguments, the value, the derivative with respect to the last argument
    ("H(p), a class with p = 0", plain_entropy, jce.entropy, [[0.0, 1.0]], 0, [inf, -1]),
    ("H(p, q), p = 0", plain_cross_entropy, jce.cross_entropy, [[0.0, 1.0], [0.5, 0.5]], np.log(2), [0, -2]),
    ("H(p, q), p = q = 0", plain_cross_entropy, jce.cross_entropy, [[0.0, 1.0], [0.0, 1.0]], 0, [0, -1]),
    ("H(p, q), p > 0 = q", plain_cross_entropy, jce.cross_entropy, [[0.5, 0.5], [0.0, 1.0]], inf, [-inf, -0.5]),
    ("KL, p = q = 0", plain_kl, jce.kl_divergence, [[0.0, 1.0], [0.0, 1.0]], 0, [0, -1]),
    ("KL, p > 0 = q", plain_kl, jce.kl_divergence, [[0.5, 0.5], [0.0, 1.0]], inf, [-inf, -0.5]),
    ("binary H, α = β = 1", plain_binary, jce.binary_cross_entropy, [1.0, 1.0], 0, -1),
    ("binary H, α = 1, β = 0", plain_binary, jce.binary_cross_entropy, [1.0, 0.0], inf, -inf),
    ("a logit of -∞, p = 0", plain_logits, jce.cross_entropy_with_logits, [[1.0, 0.0], [0.0, -inf]], 0, [0, 0]),
    ("a logit of -∞, p > 0", plain_logits, jce.cross_entropy_with_logits, [[0.5, 0.5], [0.0, -inf]], inf, [0.5, -0.5]),
    ("binary logit +∞, α = 1", plain_binary_logits, jce.binary_cross_entropy_with_logits, [1.0, inf], 0, 0),
]


def value_and_derivative(function, arguments):
    arguments = [jnp.array(x) for x in arguments]
    return jax.value_and_grad(function, len(arguments) - 1)(*arguments)


def true(got, limit):
    return all(np.allclose(g, t, rtol=1e-6, atol=0) for g, t in zip(got, limit, strict=True))


def numbers(result):
    value, derivative = (np.float32(x) + 0 for x in result)  # + 0 makes 0 of -0
    return f"{value:<9.4g}{np.array2string(derivative, precision=4):<14}"


wrong = {"plain JAX": 0, "jce": 0}
print(f"{'':26}{'the limit':23}{'plain JAX':26}jce")
for what, plain, ours, arguments, *limit in CASES:
    results = {"plain JAX": value_and_derivative(plain, arguments), "jce": value_and_derivative(ours, arguments)}
    cells = ""
    for name, got in results.items():
        wrong[name] += not true(got, limit)
        cells += numbers(got) + ("   " if true(got, limit) else "✗  ")
    print(f"{what:26}{numbers(limit)}{cells.rstrip()}")
print("\nwrong in value or derivative:", wrong, "of", len(CASES))

# %% [markdown]
# ## The effect of a wrong derivative
#
# Take a target $p$ and three models that all give the last class a probability of 0. Newton's method minimizes
# $H(p, q)$ over mixtures $q = \sum_k w_k q_k$, with weights $w = \mathrm{softmax}(t)$. With `xlogy`, the value is
# right, but the derivative at $p = q = 0$ is NaN, and therefore the first step is NaN too. With `rel_entr`, Newton's
# method converges, because JAX replaces an infinite derivative by 0. It also does this at $p > 0 = q$, where the loss
# is $+\infty$.

# %%
p = jnp.array([0.5, 0.3, 0.2, 0.0])
models = jnp.array([[0.8, 0.1, 0.1, 0.0], [0.1, 0.6, 0.2, 0.0], [0.1, 0.2, 0.7, 0.0]])


def newton_converges(divergence):
    def loss(t):
        return divergence(p, jax.nn.softmax(t) @ models)

    t = jnp.zeros(3)
    for _ in range(8):
        t -= jnp.linalg.lstsq(jax.hessian(loss)(t), jax.grad(loss)(t))[0]
    return bool(jnp.abs(jax.grad(loss)(t)).max() < 1e-6)


for name, divergence in (
    ("jce.cross_entropy", jce.cross_entropy),
    ("xlogy", plain_cross_entropy),
    ("jce.kl_divergence", jce.kl_divergence),
    ("rel_entr", plain_kl),
):
    slope = jax.grad(divergence, 1)(p, p[::-1])[0]
    print(f"{name:18} Newton converges: {newton_converges(divergence)!s:6} derivative where p > 0 = q: {slope:g}")

# %% [markdown]
# ## Close to a zero
#
# Rounding adds more edge cases. When $p$ and $q$ approach each other, $\mathrm{KL}(p \Vert q)$ decreases like the
# square of their distance, but its terms $p_i \log p_i/q_i$ decrease only like the distance. The rounded sum is
# therefore noise, and negative half of the time.
#
# The sum $\sum (p_i \log p_i/q_i - p_i + q_i)$ has the same value if $\sum p_i = \sum q_i$, and none of its terms is
# negative. However, each term is a difference of nearly equal numbers, so this sum is noise too if it is evaluated as
# written. `jce.generalized_kl_divergence` computes it accurately, however close $p$ and $q$ are.
#
# Rounded $p$ and $q$ don't have exactly the same sum. `jce.kl_divergence` is the plain sum for the numbers as stored,
# so it is negative as often as in plain JAX.

# %%
#| fig-alt: Log-log plot of KL by distance: jce follows float64; plain JAX is noise near 1e-8 for distances below 1e-4
distances = np.geomspace(1e-6, 1e-1, 60)
rng = np.random.default_rng(0)
p64 = np.tile(rng.dirichlet(np.ones(32)), (len(distances), 1))
q64 = p64 * np.exp(distances[:, None] * rng.standard_normal(32))
p32, q32 = (np.float32(x / x.sum(1, keepdims=True)) for x in (p64, q64))
with jax.enable_x64(True):
    truth = np.asarray(jce.generalized_kl_divergence(np.float64(p32), np.float64(q32)))
plain = np.asarray((rel_entr(p32, q32) - p32 + q32).sum(1))
ours = np.asarray(jce.generalized_kl_divergence(p32, q32))
error = np.abs(ours / truth - 1).max()

figure, axes = plt.subplots(figsize=(9, 5), dpi=80, layout="constrained")
axes.loglog(distances, truth, color="#0072B2", label="truth, float64")
axes.loglog(distances, ours, "o", color="#0072B2", fillstyle="none", label=f"jce, float32: within {error:.0e} of it")
for sign, marker, name in (
    (1, "^", "the same terms in plain JAX, float32"),
    (-1, "v", "plain JAX where it is negative: |·|"),
):
    there = np.sign(plain) == sign
    axes.loglog(distances[there], np.abs(plain[there]), marker, color="#D55E00", label=name)
axes.set_xlabel("distance of q from p: the standard deviation of log q/p", fontsize=13)
axes.set_ylabel("KL(p‖q), nats", fontsize=13)
axes.legend(fontsize=12)
axes.grid(color="0.88")

# %% [markdown]
# ## The claim
#
# In every case jce returns the intended result, and close to a zero `generalized_kl_divergence` stays accurate.
# `jce/README.md` has the other conventions.

# %%
assert wrong["jce"] == 0 < wrong["plain JAX"]
assert error < 1e-6
assert newton_converges(jce.cross_entropy)
assert not newton_converges(plain_cross_entropy)
assert (plain < 0).any()
assert not (ours < 0).any()
print(
    f"value and derivative at {len(CASES)} zeros and infinities: jce is right in all cases, plain JAX in"
    f" {len(CASES) - wrong['plain JAX']}; KL close to 0: jce's relative error is at most {error:.0e}, and plain JAX"
    " returns negative values"
)
