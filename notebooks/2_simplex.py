# %% [markdown]
# # The simplex: $H$ and KL have one minimizer; three descents go there at theory's rate to $10^{-5}$, Newton at order 2
#
# The problem is
#
# $$\min_{q \in \Delta} H(p, q), \qquad H(p, q) = \sum_i p_i \log \frac{1}{q_i}, \qquad
# \Delta = \{q : q_i \ge 0, \ \textstyle\sum_i q_i = 1\},$$
#
# with three classes, so that $\Delta$ is a triangle that can be drawn, and a fixed target $p$ inside it. All four
# descents start from the same $q_0$. Everything is in float64, so that there are digits to follow.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import jce

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"font.size": 12, "figure.dpi": 80})

p = jnp.array([0.6, 0.3, 0.1])
q0 = jnp.array([0.1, 0.2, 0.7])

# %% [markdown]
# ## Why $q = p$, for both
#
# $H(p, q) = \mathrm{KL}(p \Vert q) + H(p)$, and $H(p)$ doesn't depend on $q$. So the two are functions of $q$ that
# differ by a constant: they have the same gradient and the same minimizer. Which one, KL says: it is nowhere negative,
# and 0 only at $q = p$. The gradient is
#
# $$\nabla_q H(p, q) = \nabla_q \mathrm{KL}(p \Vert q) = -\frac{p}{q}.$$
#
# At the minimum this isn't zero: it is $-1$ in each entry. That vector is normal to the plane $\sum_i q_i = 1$, and
# only the part along the plane has to vanish there. (The constraint's Lagrange multiplier is 1.)

# %%
grad_h = jax.grad(jce.cross_entropy, argnums=1)
grad_kl = jax.grad(jce.kl_divergence, argnums=1)

for name, q in {"q0": q0, "p": p}.items():
    g = grad_h(p, q)
    along = g - g.mean()
    print(f"at q = {name}:  ∇H = {g.round(4)},  ∇KL = {grad_kl(p, q).round(4)},  along the plane {along.round(4)}")
h_pq, kl, h_p = jce.cross_entropy(p, q0), jce.kl_divergence(p, q0), jce.entropy(p)
print(f"H(p, q0) = {h_pq:.12f} = {kl:.12f} + {h_p:.12f} = KL(p‖q0) + H(p)")

# %% [markdown]
# ## Four descents
#
# Each deals with the constraint in its own way.
#
# - **Gradient descent on $\theta$**, where $q = \mathrm{softmax}(\theta)$ can't leave the simplex:
#   $\theta \leftarrow \theta - \eta \, \nabla_\theta H$, with $\nabla_\theta H = q - p$. The Hessian is
#   $\operatorname{diag}(q) - qq^\top$, nowhere above $1/2$, so $\eta = 2$ is safe everywhere.
# - **Mirror descent** with the entropy as mirror map, also called exponentiated gradient (Kivinen and Warmuth, 1997;
#   Beck and Teboulle, 2003): $q \leftarrow q \, e^{-\eta \nabla_q H} / Z$. The factors are positive and $Z$ makes the
#   sum 1. Here $\eta = 1/2$.
# - **Projected gradient**: a step that may leave the simplex, then the nearest point of it,
#   $q \leftarrow P_\Delta(q - \eta \, \nabla_q H)$. The curvature $p_i/q_i^2$ has no bound, so no $\eta$ is safe
#   everywhere; $1/16$ is small enough from this $q_0$.
# - **Newton on $\theta$**: $\theta \leftarrow \theta - t \, d$, where $(\nabla^2_\theta H) \, d = \nabla_\theta H$. A
#   constant added to $\theta$ changes nothing, so the Hessian is singular along $\mathbf 1$. Nor has the gradient a
#   part along $\mathbf 1$. So one solves with $\nabla^2_\theta H + \mathbf 1 \mathbf 1^\top$, which isn't singular:
#   multiplied by $\mathbf 1^\top$, the system says that $\mathbf 1^\top d = 0$, and then that $d$ solves the first one.
#   Far from the minimum the full step, $t = 1$, can raise $H$; it is halved until it doesn't.
#
# The gap $H(p, q) - H(p)$ isn't computed as a difference: near $10^{-16}$ the two numbers have the same digits. It is
# the sum of $p_i \log (p_i/q_i) - p_i + q_i$, by `jce.generalized_kl_divergence`: on the simplex that is
# $\mathrm{KL}(p \Vert q)$, and none of its terms is negative, so all digits stay.

# %%
ETA_THETA, ETA_MIRROR, ETA_PROJECTED = 2, 1 / 2, 1 / 16


def h_of_theta(theta):
    return jce.cross_entropy_with_logits(p, theta)


def gap(q):
    return jce.generalized_kl_divergence(p, q)


def gradient_descent(theta):
    return theta - ETA_THETA * jax.grad(h_of_theta)(theta)


def mirror_descent(q):
    q = q * jnp.exp(-ETA_MIRROR * grad_h(p, q))
    return q / q.sum()


def projected_gradient(q):
    return optax.projections.projection_simplex(q - ETA_PROJECTED * grad_h(p, q))


def solve_singular(hessian, g):
    return jnp.linalg.solve(hessian + 1, g)  # + 1 in each entry is + 𝟏𝟏ᵀ


def newton_direction(theta):
    return solve_singular(jax.hessian(h_of_theta)(theta), jax.grad(h_of_theta)(theta))


def newton(theta):
    trials = theta - 2.0 ** -jnp.arange(10)[:, None] * newton_direction(theta)  # t = 1, 1/2, 1/4, …
    falls = gap(jax.nn.softmax(trials)) <= gap(jax.nn.softmax(theta))
    return trials[jnp.argmax(falls)]  # the first that doesn't raise H


def iterates(step, start, steps):
    return jax.lax.scan(lambda x, _: (step(x), x), start, length=steps + 1)[1]


# %% [markdown]
# ## The four paths
#
# Paths of $\theta$ start from $\theta_0 = \log q_0$, and softmax maps them to $q$. The point $q$ is drawn at
# $\sum_i q_i c_i$, where the $c_i$ are the corners of the triangle. The grey lines are levels of
# $\mathrm{KL}(p \Vert q)$, in nats, which goes to $+\infty$ at each edge. Newton's first step overshoots nearly into a
# corner, from where the full second step would be no descent.

# %%
#| fig-alt: Triangle with level curves around p: four methods' paths lead from q0 to p, Newton's by way of a corner
theta0 = jnp.log(q0)
newton_thetas = iterates(newton, theta0, 8)
paths = {
    "gradient descent on θ": jax.nn.softmax(iterates(gradient_descent, theta0, 220)),
    "mirror descent": iterates(mirror_descent, q0, 220),
    "projected gradient": iterates(projected_gradient, q0, 220),
    "Newton on θ": jax.nn.softmax(newton_thetas),
}
gaps = {name: gap(path) for name, path in paths.items()}
full_step = gap(jax.nn.softmax(newton_thetas[1] - newton_direction(newton_thetas[1])))
print("Newton's gaps:", " ".join(f"{x:.1e}" for x in gaps["Newton on θ"]))
print(f"after a full second step: {full_step:.1e}")

STROKES = {
    "gradient descent on θ": ("#0072B2", "-", "o"),
    "mirror descent": ("#D55E00", "--", "s"),
    "projected gradient": ("#009E73", "-.", "^"),
    "Newton on θ": ("#CC79A7", ":", "D"),
}
corners = jnp.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])
i, j = jnp.triu_indices(119)
grid = jnp.stack([i + 1, j - i + 1, 119 - j], axis=1) / 120  # all (a, b, c)/120 inside the triangle
levels = jnp.array([0.02, 0.1, 0.3, 0.6, 1.2])
ray = jnp.linspace(p, jnp.array([0, 0.65, 0.35]), 500, endpoint=False)  # along it the levels are labelled
places = ray[jnp.abs(gap(ray)[:, None] - levels).argmin(axis=0)] @ corners

figure, axes = plt.subplots(figsize=(7, 5.6), layout="constrained")
lines = axes.tricontour(*(grid @ corners).T, gap(grid), levels, colors="0.7", linewidths=0.7, antialiased=False)
axes.clabel(lines, fmt="%g", fontsize=12, colors="0.3", manual=places.tolist())
axes.plot(*corners[jnp.array([0, 1, 2, 0])].T, color="black", linewidth=0.7, antialiased=False)
for name, path in paths.items():
    colour, stroke, marker = STROKES[name]
    axes.plot(*(path @ corners).T, stroke, color=colour, marker=marker, markersize=7, linewidth=2, label=name)
for point, text, offset in [(p, "p", (-18, 2)), (q0, "q₀", (10, 4))]:
    axes.plot(*(point @ corners), "o", color="black", markersize=9, zorder=5)
    axes.annotate(text, point @ corners, offset, textcoords="offset points", fontsize=16)
for corner, text, below in zip(corners, ("q = (1, 0, 0)", "q = (0, 1, 0)", "q = (0, 0, 1)"), (18, 18, -8), strict=True):
    axes.annotate(text, corner, (0, -below), textcoords="offset points", ha="center")
axes.legend(loc="upper left", frameon=False)
axes.set_axis_off()
axes.set_aspect("equal")

# %% [markdown]
# ## The rate that theory gives to each
#
# Near its fixed point an iteration multiplies the error by its Jacobian there. The distance then falls by the factor
# $\rho$ per step, the Jacobian's largest eigenvalue in modulus (Ostrowski's theorem: Ortega and Rheinboldt, *Iterative
# Solution of Nonlinear Equations in Several Variables*, section 10.1). Errors have no part along $\mathbf 1$, so only
# eigenvalues on the plane orthogonal to it count.
#
# - **Gradient descent on $\theta$**: the Jacobian is $I - \eta \, (\operatorname{diag}(p) - pp^\top)$, so that
#   $\rho = \max_\lambda |1 - \eta\lambda|$ over the eigenvalues $\lambda$ of that Hessian.
# - **Projected gradient**: near $p$ no constraint $q_i \ge 0$ is active, and $P_\Delta$ only takes the mean from a
#   step: it multiplies it by $C = I - \mathbf 1 \mathbf 1^\top/n$. The Hessian with respect to $q$ is
#   $\operatorname{diag}(p/q^2)$, which at $q = p$ is $\operatorname{diag}(1/p)$. So
#   $\rho = \max_\lambda |1 - \eta\lambda|$ over the eigenvalues of $C \operatorname{diag}(1/p) \, C$.
# - **Mirror descent**: let $q = p \, (1 + \delta)$, where $\sum_i p_i \delta_i = 0$. To first order
#   $\log q = \log p + \delta$ and $p/q = 1 - \delta$. A step adds $\eta \, p/q$ to $\log q$ and takes the constant
#   $\log Z$ away, so $\delta$ becomes $(1 - \eta) \, \delta$ and a constant, which has to be 0 to keep
#   $\sum_i p_i \delta_i = 0$. Thus $\rho = |1 - \eta|$: all directions shrink alike, whatever $p$ is, since at $q = p$
#   the mirror map has the Hessian of $H$, $\operatorname{diag}(1/p)$. With $\eta = 1$ the Jacobian is 0, as Newton's
#   is.
#
# KL is quadratic in the error, so it falls by $\rho^2$ a step. The measured factor is the square root of KL's mean
# factor on its way from $10^{-10}$ to $10^{-20}$, where all but the slowest direction is gone and rounding is still
# far.


# %%
def contraction(hessian, eta):
    centre = jnp.eye(len(p)) - 1 / len(p)
    eigenvalues = jnp.linalg.eigvalsh(centre @ hessian @ centre)[1:]  # without the 0 of 𝟏
    return jnp.abs(1 - eta * eigenvalues).max()


def measured_rate(gaps):
    k, m = (jnp.argmax(gaps < level) for level in (1e-10, 1e-20))
    return (gaps[m] / gaps[k]) ** (0.5 / (m - k))


hessian_theta, hessian_q = jax.hessian(h_of_theta)(jnp.log(p)), jax.hessian(jce.cross_entropy, argnums=1)(p, p)
predicted = {
    "gradient descent on θ": contraction(hessian_theta, ETA_THETA),
    "mirror descent": 1 - ETA_MIRROR,
    "projected gradient": contraction(hessian_q, ETA_PROJECTED),
}
measured = {name: measured_rate(gaps[name]) for name in predicted}
for name, rate in predicted.items():
    print(f"{name:22} predicted {rate:.7f}  measured {measured[name]:.7f}")

# %% [markdown]
# ## Newton's order
#
# Newton's Jacobian at the minimum is 0, and the next term rules. With $e = \theta - \theta^*$, Taylor's formula for the
# gradient gives
#
# $$e_{k+1} = \tfrac12 \, (\nabla^2 H)^{-1} \, \nabla^3 H[e_k, e_k] + O(|e_k|^3),$$
#
# so $|e_{k+1}| \le c \, |e_k|^2$ (Nocedal and Wright, *Numerical Optimization*, theorem 3.5). The third derivative is
# that of jce's function, by `jax.jvp` of the Hessian. As $d$ has no part along $\mathbf 1$, the mean of $\theta$ stays
# what it was; this picks the limit $\theta^*$ among all $\log p + \text{constant}$.
#
# The path itself has few steps before it reaches rounding. So one step is taken from each of six points, at distances
# $10^{-1}, \dots, 10^{-6}$ from $\theta^*$, in the direction in which the path came in. The order is the slope of
# $\log |e_{k+1}|$ against $\log |e_k|$.

# %%
theta_star = jnp.log(p) + (theta0 - jnp.log(p)).mean()


def distance(theta):
    return jnp.linalg.norm(theta - theta_star, axis=-1)


def next_distance(theta):
    error = theta - theta_star
    hessian, derivative = jax.jvp(jax.hessian(h_of_theta), (theta,), (error,))
    return jnp.linalg.norm(solve_singular(hessian, derivative @ error / 2))


direction = (newton_thetas[5] - theta_star) / distance(newton_thetas[5])
before = 10.0 ** -jnp.arange(1, 7)
starts = theta_star + before[:, None] * direction
after, foreseen = distance(jax.vmap(newton)(starts)), jax.vmap(next_distance)(starts)
orders = -jnp.diff(jnp.log10(after))
print("|e| before  |e| after  by the third derivative  slope, from the row above")
for *row, order in zip(before, after, foreseen, [None, *orders], strict=True):
    print("{:10.0e}  {:9.3e}  {:23.3e}".format(*row) + (f"  {order:5.3f}" if order is not None else ""))

# %% [markdown]
# ## The gap against steps
#
# Marks are measured, at every fifth step but for Newton. The thin lines aren't fitted: each has the slope $\rho^2$ that
# theory predicts, and is laid through one measured point, near $10^{-10}$. Newton's gaps double their exponent at each
# step, until, like the others below $10^{-30}$, $q$ is $p$ up to its last bits.

# %%
#| fig-alt: Gap by step on a log scale: straight lines with the predicted slopes for three methods, a fall for Newton
figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for name, values in gaps.items():
    colour, _, marker = STROKES[name]
    every = 1 if name == "Newton on θ" else 5
    axes.plot(jnp.arange(len(values))[::every], values[::every], marker, color=colour, markersize=7, label=name)
for name, rate in predicted.items():
    k, steps = jnp.argmax(gaps[name] < 1e-10), jnp.array([0, 220])
    label = "predicted slopes" if name == "mirror descent" else None
    axes.plot(steps, gaps[name][k] * rate ** (2.0 * (steps - k)), color="black", linewidth=1, label=label)
axes.set(xlabel="step", ylabel="H(p, q) − H(p) = KL(p‖q), nats", yscale="log", ylim=(1e-33, 10), xlim=(0, 220))
axes.legend()
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## The claim, asserted
#
# One minimizer for $H$ and KL, four descents that reach it, three linear rates, and Newton's order.

# %%
assert (grad_h(p, q0) == grad_kl(p, q0)).all()
assert jnp.allclose(grad_h(p, q0), -p / q0, rtol=1e-14, atol=0)
assert (grad_h(p, p) == -1).all()
assert (grad_kl(p, p) == -1).all()
assert jnp.allclose(h_pq, kl + h_p, rtol=1e-14, atol=0)
assert jnp.allclose(hessian_theta, jnp.diag(p) - jnp.outer(p, p), rtol=0, atol=1e-15)
assert full_step > gaps["Newton on θ"][1] > gaps["Newton on θ"][2]

farthest = max(values[-1] for values in gaps.values())
assert farthest < 1e-28
assert all(jnp.abs(path[-1] - p).max() < 1e-13 for path in paths.values())
worst = max(abs(measured[name] / rate - 1) for name, rate in predicted.items())
assert worst < 1e-5
assert jnp.abs(after / foreseen - 1).max() < 0.05
assert jnp.abs(orders - 2).max() < 0.05

print(
    f"H and KL have one minimizer, q = p, and all four descents reach it, to a KL of {farthest:.0e}: "
    f"three at theory's rate to {worst:.0e}, Newton at order {orders.mean():.2f}"
)
