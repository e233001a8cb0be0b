# %% [markdown]
# # The simplex: $H$ and KL have the same minimizer; three methods converge at the predicted rates, Newton at order 2
#
# The problem is
#
# $$\min_{q \in \Delta} H(p, q), \qquad H(p, q) = \sum_i p_i \log \frac{1}{q_i}, \qquad
# \Delta = \{q : q_i \ge 0, \ \textstyle\sum_i q_i = 1\},$$
#
# with three classes, so that $\Delta$ is a triangle that we can draw, and a fixed target $p$ inside it. We compare four
# methods that start from the same $q_0$. Everything is in float64, so that we can follow them close to the minimum.

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
# ## Both have the minimizer $q = p$
#
# $H(p, q) = \mathrm{KL}(p \Vert q) + H(p)$, and $H(p)$ doesn't depend on $q$. So $H(p, q)$ and KL are functions of $q$
# that differ by a constant: they have the same gradient and the same minimizer. The minimizer is $q = p$, because KL is
# never negative, and 0 only there. The gradient is
#
# $$\nabla_q H(p, q) = \nabla_q \mathrm{KL}(p \Vert q) = -\frac{p}{q}.$$
#
# At the minimum, the gradient isn't zero: each entry is $-1$. This vector is normal to the plane $\sum_i q_i = 1$, and
# only the component of the gradient along the plane has to be zero. (The Lagrange multiplier of the constraint is 1.)

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
# ## Four methods
#
# The methods differ in how they satisfy the constraint.
#
# - **Gradient descent on $\theta$**, where $q = \mathrm{softmax}(\theta)$ can't leave the simplex:
#   $\theta \leftarrow \theta - \eta \, \nabla_\theta H$, with $\nabla_\theta H = q - p$. The Hessian is
#   $\operatorname{diag}(q) - qq^\top$. None of its eigenvalues exceeds $1/2$, so $\eta = 2$ is safe everywhere.
# - **Mirror descent** with the entropy as mirror map, also called exponentiated gradient (Kivinen and Warmuth, 1997;
#   Beck and Teboulle, 2003): $q \leftarrow q \, e^{-\eta \nabla_q H} / Z$. The factors are positive, and dividing by
#   $Z$ makes the sum 1. Here $\eta = 1/2$.
# - **Projected gradient**: a step that may leave the simplex, followed by a projection to the nearest point of the
#   simplex, $q \leftarrow P_\Delta(q - \eta \, \nabla_q H)$. The curvature $p_i/q_i^2$ has no bound, so no $\eta$ is
#   safe everywhere. From this $q_0$, $\eta = 1/16$ is small enough.
# - **Newton on $\theta$**: $\theta \leftarrow \theta - t \, d$, where $(\nabla^2_\theta H) \, d = \nabla_\theta H$. If
#   you add a constant to every $\theta_i$, $q$ doesn't change. So the Hessian is singular along $\mathbf 1$, and the
#   gradient has no component along $\mathbf 1$. Instead, we solve a system with the matrix
#   $\nabla^2_\theta H + \mathbf 1 \mathbf 1^\top$, which isn't singular. Multiplying this system by $\mathbf 1^\top$
#   shows that $\mathbf 1^\top d = 0$, so $d$ also solves the original system. Far from the minimum, the full step,
#   $t = 1$, can raise $H$. Then we halve $t$ until $H$ doesn't rise.
#
# We don't compute the gap $H(p, q) - H(p)$ as a difference: when the gap is near $10^{-16}$, both rounded numbers are
# the same. Instead, `jce.generalized_kl_divergence` computes the sum of $p_i \log (p_i/q_i) - p_i + q_i$. On the
# simplex, this sum is $\mathrm{KL}(p \Vert q)$. None of its terms is negative, so it stays accurate.

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
# Paths of $\theta$ start from $\theta_0 = \log q_0$, and softmax maps them to $q$. The picture shows the point $q$ at
# $\sum_i q_i c_i$, where the $c_i$ are the corners of the triangle. The grey lines are level curves of
# $\mathrm{KL}(p \Vert q)$, in nats. KL goes to $+\infty$ at each edge. Newton's first step overshoots and ends near a
# corner. From there, the full second step would raise $H$.

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
# ## The predicted rates
#
# Near its fixed point, an iteration multiplies the error by its Jacobian at that point. The error then falls by a
# factor of $\rho$ per step, where $\rho$ is the largest modulus of the Jacobian's eigenvalues (Ostrowski's theorem:
# Ortega and Rheinboldt, *Iterative Solution of Nonlinear Equations in Several Variables*, section 10.1). Errors have no
# component along $\mathbf 1$, so only eigenvalues on the plane orthogonal to $\mathbf 1$ count.
#
# - **Gradient descent on $\theta$**: the Jacobian is $I - \eta \, (\operatorname{diag}(p) - pp^\top)$, so that
#   $\rho = \max_\lambda |1 - \eta\lambda|$ over the eigenvalues $\lambda$ of that Hessian.
# - **Projected gradient**: near $p$ no constraint $q_i \ge 0$ is active. There, $P_\Delta$ only subtracts the mean from
#   a step, so it multiplies the step by $C = I - \mathbf 1 \mathbf 1^\top/n$. The Hessian with respect to $q$ is
#   $\operatorname{diag}(p/q^2)$, which at $q = p$ is $\operatorname{diag}(1/p)$. So
#   $\rho = \max_\lambda |1 - \eta\lambda|$ over the eigenvalues of $C \operatorname{diag}(1/p) \, C$.
# - **Mirror descent**: let $q = p \, (1 + \delta)$, where $\sum_i p_i \delta_i = 0$. To first order
#   $\log q = \log p + \delta$ and $p/q = 1 - \delta$. A step adds $\eta \, p/q$ to $\log q$ and subtracts the constant
#   $\log Z$, so $\delta$ becomes $(1 - \eta) \, \delta$ plus a constant. This constant must be 0, because
#   $\sum_i p_i \delta_i$ stays 0. Thus $\rho = |1 - \eta|$. All directions shrink by the same factor, for every $p$,
#   because at $q = p$ the mirror map has the same Hessian as $H$, $\operatorname{diag}(1/p)$. With $\eta = 1$ the
#   Jacobian is 0, as it is for Newton's method.
#
# Near $p$, KL is quadratic in the error, so it falls by a factor of $\rho^2$ per step. We measure the mean factor (the
# geometric mean) by which KL falls per step between $10^{-10}$ and $10^{-20}$, and take its square root. In this range,
# only the slowest direction is left, and rounding errors are still negligible.


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
# The Jacobian of Newton's method at the minimum is 0, so the next term determines the error. With
# $e = \theta - \theta^*$, Taylor's formula for the gradient gives
#
# $$e_{k+1} = \tfrac12 \, (\nabla^2 H)^{-1} \, \nabla^3 H[e_k, e_k] + O(|e_k|^3),$$
#
# so $|e_{k+1}| \le c \, |e_k|^2$ (Nocedal and Wright, *Numerical Optimization*, theorem 3.5). We compute
# the third derivative of jce's function with `jax.jvp` of the Hessian. Because $d$ has no component along $\mathbf 1$,
# the mean of $\theta$ doesn't change. This determines the limit $\theta^*$ among all $\log p + \text{constant}$.
#
# Newton's path has too few steps before rounding errors dominate. So we take one step from each of six points, at
# distances $10^{-1}, \dots, 10^{-6}$ from $\theta^*$, in the direction from which the path approached $\theta^*$. The
# order is the slope of $\log |e_{k+1}|$ against $\log |e_k|$.

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
# The markers are measured gaps, at every step for Newton and at every fifth step for the other methods. The thin lines
# aren't fitted: each has the predicted slope, a factor of $\rho^2$ per step, and goes through one measured point, near
# $10^{-10}$. For Newton, the exponent of the gap doubles at each of the last steps. Near $10^{-30}$, $q$ equals $p$ up
# to its last bits.

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
# ## The claim
#
# The last cell asserts that $H$ and KL have the same minimizer, that all four methods reach it, and that the three
# linear rates (up to $10^{-5}$) and Newton's order are as predicted.

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
    f"H and KL have the same minimizer, q = p, and all four methods reach it, up to a KL of {farthest:.0e}: "
    f"three at the predicted rates, up to {worst:.0e}, and Newton at order {orders.mean():.2f}"
)
