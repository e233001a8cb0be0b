"""Edge cases (0, 1, ±∞, NaN): values and derivatives in both modes equal the table's. No other entry becomes NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce
from tests.kernels import KERNELS, Kernel, each_kernel, each_with_classes, easy, gradient, modes, op_by_op, total


def stacked(kernel: Kernel, dtype=np.float32) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """All edge cases (`Corner`) of a kernel as one batch: arguments, values, gradients."""
    arguments = zip(*(corner.arguments for corner in kernel.corners), strict=True)
    gradients = zip(*(corner.gradient for corner in kernel.corners), strict=True)
    values = [corner.value for corner in kernel.corners]
    return [np.array(x, dtype) for x in arguments], np.array(values), [np.array(x) for x in gradients]


def agrees(got, expected, *what):
    """Check equality up to rounding. An error message begins with `what`."""
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-30, err_msg=", ".join(what))


def along_each(kernel: Kernel, arguments: list[np.ndarray]) -> tuple[tuple, tuple]:
    """The batch once for each number of a row, with a unit direction along that number: one call finds all derivatives.

    Arguments and directions have the shape (arguments × classes, rows, classes), elementwise without the last axis.
    """
    numbers = len(arguments) * (arguments[0].shape[-1] if kernel.has_classes else 1)
    of_row = np.eye(numbers, dtype=arguments[0].dtype).reshape(numbers, len(arguments), -1)
    batch = tuple(np.broadcast_to(x, (numbers, *x.shape)) for x in arguments)
    directions = (of_row[:, i, None] if kernel.has_classes else of_row[:, i] for i in range(len(arguments)))
    return batch, tuple(np.broadcast_to(t, x.shape) for t, x in zip(directions, batch, strict=True))


@each_kernel
@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_value_and_gradient(kernel, dtype):
    """Values and gradients in both modes, and derivatives with respect to one argument at a time.

    A tangent of zeros and a Hessian times zeros are exactly 0. The gradient under an outer `where` or with a weight of
    0 is also exactly 0: a cotangent of 0 leaves no NaN.
    """
    arguments, values, gradients = stacked(kernel, dtype)
    function, positions = kernel.function, tuple(range(len(arguments)))
    kept, finite = np.zeros(values.shape, bool), np.isfinite(values)

    def selected(*x):
        return jnp.where(kept, function(*x), 0).sum()

    def weighted(*x):
        return jnp.vdot(kept.astype(dtype), jnp.where(finite, function(*x), 0))

    def of_one(x, directions, i):
        """The derivatives of the function of argument i alone."""
        return jax.jvp(lambda y: function(*x[:i], y, *x[i + 1 :]), (x[i],), (directions[i],))[1]

    @jax.jit
    def run(x, zeros, batch, directions):
        derivatives = {
            "forward": jax.jvp(function, batch, directions)[1],
        }
        if len(positions) > 1:
            derivatives["one argument"] = sum(of_one(batch, directions, i) for i in positions)
        none = {
            "a tangent of zeros": jax.jvp(function, x, zeros)[1],
            "a Hessian times zeros": jax.jvp(jax.grad(total(kernel), positions), x, zeros)[1],
            "an outer where": jax.grad(selected, positions)(*x),
            "a weight of 0": jax.grad(weighted, positions)(*x),
        }
        return jax.vmap(jax.grad(function, positions))(*x), derivatives, none

    with jax.enable_x64(dtype == np.float64):
        agrees(function(*arguments), values)
        x = tuple(arguments)
        found, derivatives, none = run(x, tuple(map(np.zeros_like, x)), *along_each(kernel, arguments))
    for argument, got, expected in zip(kernel.arguments, found, gradients, strict=True):
        agrees(got, expected, "reverse", argument)
    for mode, got in derivatives.items():  # numbers × rows
        agrees(np.transpose(got), np.concatenate([g.reshape(len(values), -1) for g in gradients], 1), mode)
    for way, found in none.items():
        for got in jax.tree.leaves(found):
            np.testing.assert_array_equal(got, np.zeros_like(got), err_msg=way)


@each_kernel
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.in_turn(8, "wide")
def test_alone_and_eagerly(kernel, step):
    """Edge cases one at a time, not in a batch. Eager calls are jitted inside; disable_jit runs them op by op."""
    eager_gradient = jax.grad(total(kernel), tuple(range(len(kernel.arguments))))
    for corner in kernel.corners[::step]:
        arguments = [np.float32(x) for x in corner.arguments]
        agrees(kernel.function(*arguments), corner.value)
        for argument, got, expected in zip(kernel.arguments, eager_gradient(*arguments), corner.gradient, strict=True):
            agrees(got, expected, argument)
        with op_by_op():
            agrees(kernel.function(*arguments), corner.value)


NESTINGS = ("forward over reverse", "reverse over forward", "reverse over reverse")


@each_kernel
def test_second_derivatives(kernel, rng):
    """The Hessian is the same in all nestings, in ordinary rows and at edge cases. It is NaN only if the value is NaN.

    Along a direction that is 0 at edge cases and 1 in ordinary rows, the Hessian-vector product is 0 at edge cases, and
    the sum of the row's second derivatives in ordinary rows.
    """
    arguments, values, _ = stacked(kernel)
    regular = [corner.second_order for corner in kernel.corners]
    ordinary = easy(kernel, rng, (2, *arguments[0].shape[1:]))
    arguments = [np.concatenate([x[regular], y]) for x, y in zip(arguments, ordinary, strict=True)]
    is_number = ~np.isnan(np.append(values[regular], [0, 0]))
    batch, directions = along_each(kernel, arguments)
    along = [np.concatenate([np.zeros_like(x[:-2]), np.ones_like(x[-2:])]) for x in arguments]
    batch = tuple(np.concatenate([x, x[:1]]) for x in batch)
    directions = tuple(np.concatenate([t, x[None]]) for t, x in zip(directions, along, strict=True))

    programs = modes(total(kernel), tuple(range(len(arguments))))
    run = jax.jit(lambda x, t: {nesting: programs[nesting](x, t) for nesting in NESTINGS})
    hessians = []  # numbers of a row × rows × numbers of a row; the first axis is that of the outer derivative
    for nesting, found in run(batch, directions).items():
        columns = np.concatenate([np.reshape(x, (*batch[0].shape[:2], -1)) for x in found], -1)
        hessian, product = columns[:-1], columns[-1]
        np.testing.assert_allclose(product[-2:], hessian[:, -2:].sum(0), rtol=1e-5, atol=1e-6, err_msg=nesting)
        np.testing.assert_array_equal(product[:-2], np.zeros_like(product[:-2]), err_msg=nesting)
        assert not np.isnan(hessian[:, is_number]).any(), nesting
        hessians.append(hessian if nesting.startswith("forward") else hessian.swapaxes(0, 2))
        np.testing.assert_allclose(hessians[-1], hessians[0], rtol=1e-5, atol=1e-7, err_msg=nesting)


# JAX before 0.12 loses the derivative rule of the head's own loop inside another loop, unless that one is checkpointed.
KEPT = jax.__version_info__ >= (0, 12)
LOOPS = {"map": lambda function: function, "checkpointed map": jax.checkpoint}


@each_kernel
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.needs_jit
@pytest.mark.one_for_each("kernel")
@pytest.mark.in_turn(9, "wide")
def test_a_loop_over_rows(kernel, nesting, rng):
    """Hessian-vector products of a loop over rows. Each function takes one of the two loops, in turn.

    Cotangents vary with the row and, if all of its numbers are finite, with its value.
    """
    needs_the_checkpoint = kernel.function.__name__ == "linear_cross_entropy" and not KEPT
    loop = list(LOOPS)[1 if needs_the_checkpoint else KERNELS.index(kernel) % 2]
    corners = [corner for corner in kernel.corners if corner.second_order and not corner.holds_nan()]
    finite = np.array([np.isfinite([c.value, *np.ravel(c.gradient)]).all() for c in corners])
    arguments = [np.array(x, np.float32) for x in zip(*(corner.arguments for corner in corners), strict=True)]
    # Along one argument at a time: -1/q dp + p/q² dq is ∞ - ∞ at q = 0.
    count = len(arguments)
    weights, finite = rng.standard_normal(count * len(corners)).astype(np.float32), np.tile(finite, count)
    along = [rng.standard_normal(x.shape).astype(np.float32) for x in arguments]
    along = tuple(np.concatenate([t * np.float32(i == j) for j in range(count)]) for i, t in enumerate(along))
    arguments = tuple(np.concatenate([x] * count) for x in arguments)

    def loss(rows):
        return weights @ rows + jnp.square(jnp.where(finite, rows, 0)).sum()

    def in_a_loop(*arguments):
        return loss(jax.lax.map(LOOPS[loop](lambda row: kernel.function(*row)), arguments))

    def program(function, nesting):
        return jax.jit(modes(function, tuple(range(count)))[nesting])(arguments, along)

    expected = program(lambda *arguments: loss(kernel.function(*arguments)), "forward over reverse")
    for got, x in zip(program(in_a_loop, nesting), expected, strict=True):
        np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)
        assert not np.isnan(got).any()


@each_kernel
@pytest.mark.in_turn(8, "wide")
def test_third_derivatives(kernel):
    """Third derivatives are not NaN, along any two numbers, forward or reverse: no order computes 0 · ∞."""
    arguments, values, _ = stacked(kernel)
    # Leave out the smallest normal number: there 1/q² is beyond the float range, which is not an edge case.
    huge = [((x != 0) & (np.abs(x) < 1e-30)).reshape(len(values), -1).any(1) for x in arguments]
    inside = ~np.isnan(values) & ~np.any(huge, axis=0) & [corner.second_order for corner in kernel.corners]
    *others, x = (x[inside] for x in arguments)
    n = x.shape[-1] if kernel.has_classes else 1
    each = np.eye(n, dtype=np.float32)[:, None] if kernel.has_classes else np.ones((1, 1), np.float32)

    @jax.jit
    def thirds(x, t, s):
        def along(f, t):
            return lambda x: jax.jvp(f, (x,), (t,))[1]

        def function(x):
            return kernel.function(*(jnp.broadcast_to(y, x.shape) for y in others), x).sum()

        second = along(jax.grad(function), t)
        return along(second, s)(x), jax.grad(lambda x: jnp.vdot(second(x), s))(x)

    shape = (n, n, *x.shape)
    for third in thirds(*(np.broadcast_to(y, shape) for y in (x, each[:, None], each))):
        assert not np.isnan(third).any()


HALF = np.float32(0.5)
SMALL = {  # functions of a small p, and the limit for p → 0 of the third derivative along p, divided by p
    "entropy": (lambda p: jce.entropy(p[:, None]), 1),
    "cross_entropy in q": (lambda q: jce.cross_entropy(jax.lax.stop_gradient(q)[:, None], q[:, None]), -2),
    "cross_entropy in both": (lambda p: jce.cross_entropy(p[:, None], p[:, None]), 1),
    "kl_divergence": (lambda p: jce.kl_divergence(p[:, None], jnp.full_like(p, HALF)[:, None]), -1),
    "kl_divergence in q": (lambda q: jce.kl_divergence(jax.lax.stop_gradient(q)[:, None], q[:, None]), -2),
    "generalized_kl_divergence": (lambda p: jce.generalized_kl_divergence(p[:, None], 0 * p[:, None] + HALF), -1),
    "binary_entropy": (jce.binary_entropy, 1),
    "binary_cross_entropy in beta": (lambda b: jce.binary_cross_entropy(jax.lax.stop_gradient(b), b), -2),
    "binary_kl_divergence": (lambda a: jce.binary_kl_divergence(a, HALF), -1),
    "binary_kl_divergence in beta": (lambda b: jce.binary_kl_divergence(jax.lax.stop_gradient(b), b), -2),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.in_turn(2)
def test_third_derivatives_along_a_small_probability(name):
    """d³/ds³ f(p(1 + s)) is about as large as p, in all eight nestings, even if float32 can't hold 1/p² and p²."""
    function, expected = SMALL[name]
    p = np.float32(10.0 ** -np.arange(5, 38, 4))
    ones = np.ones_like(p)

    def forward(f):
        return lambda s: jax.jvp(f, (s,), (ones,))[1]

    def reverse(f):
        return lambda s: jax.vjp(f, s)[1](ones)[0]

    @jax.jit
    def thirds(s):
        modes = (forward, reverse)
        return [a(b(c(lambda s: function(p * (1 + s)))))(s) for a in modes for b in modes for c in modes]

    for third in thirds(0 * p):
        np.testing.assert_allclose(third / p, np.full_like(p, expected), rtol=1e-4)


@pytest.mark.slow
def test_infinite_second_derivatives():
    inf = np.inf
    q = np.float32([0.5, 0.5])
    for zero in (0.0, -0.0):
        p = np.float32([zero, 1])
        np.testing.assert_array_equal(jax.hessian(jce.entropy)(p), [[-inf, 0], [0, -1]])
        for function in (jce.kl_divergence, jce.generalized_kl_divergence):
            np.testing.assert_array_equal(jax.hessian(function)(p, q), [[inf, 0], [0, 1]])
            np.testing.assert_array_equal(jax.hessian(function, 1)(q, p), [[inf, 0], [0, 0.5]])
    for alpha in (0.0, -0.0, 1.0):
        assert jax.grad(jax.grad(jce.binary_entropy))(alpha) == -inf
        assert jax.grad(jax.grad(jce.binary_kl_divergence))(alpha, 0.5) == inf


def test_finite_second_derivatives():
    """If a first derivative with respect to either argument is finite, the second is the formula's: p/q², 1/β², ..."""
    p, q = np.float32([0, 1]), np.float32([0.5, 0.5])
    for function in (jce.cross_entropy, jce.kl_divergence, jce.generalized_kl_divergence):
        agrees(jax.jit(jax.hessian(function, 1))(p, q), [[0, 0], [0, 4]])
        agrees(jax.jit(jax.hessian(function, 1))(p, p), [[0, 0], [0, 1]])
    agrees(jax.jit(jax.jacfwd(jax.grad(jce.cross_entropy, 0), 1))(p, q), [[-2, 0], [0, -2]])
    for function in (jce.binary_cross_entropy, jce.binary_kl_divergence):
        second = jax.jit(jax.vmap(jax.grad(jax.grad(function, 1), 1)))
        agrees(second(np.float32([0, 1, 0, 1]), np.float32([0, 1, 0.5, 0.5])), [1, 1, 4, 4])


def test_higher_derivatives_of_a_sampled_divergence():
    """Second and third derivatives are ±q/p. For two impossible outcomes q/p is 1, as for equal probabilities."""
    log_p, log_q = np.float32([-1, -3, -1, -np.inf]), np.float32([-3, -1, -1, -np.inf])
    q_over_p, signs = np.exp([-2.0, 2.0, 0.0, 0.0]), np.array([-1, 1])
    second = jax.hessian(lambda x: jce.sampled_kl_divergence(*x))
    of_second = np.outer(signs, signs)
    for derivative, of_each in ((second, of_second), (jax.jacfwd(second), np.multiply.outer(signs, of_second))):
        got = jax.jit(jax.vmap(derivative))(np.stack([log_p, log_q], -1))
        np.testing.assert_allclose(got, np.multiply.outer(q_over_p, of_each), rtol=1e-6)


@each_with_classes
@pytest.mark.in_turn(3, "wide")
def test_absent_classes(kernel, rng):
    """A class with p = q = 0 doesn't change the value or other classes' gradients, and its own gradient is not NaN."""
    if None in kernel.absent:
        pytest.skip("every class counts")
    arguments = easy(kernel, rng, (4, 5))
    padded = [np.pad(x, [(0, 0), (0, 3)], constant_values=a) for x, a in zip(arguments, kernel.absent, strict=False)]
    run = jax.jit(lambda *both: [(kernel.function(*x), gradient(kernel)(*x)) for x in both])
    (value, gradients), (expected_value, expected_gradients) = run(padded, arguments)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for argument, g, expected in zip(kernel.arguments, gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(g[:, :5], expected, rtol=1e-6, err_msg=argument)
        assert not np.isnan(g).any(), argument


@pytest.mark.holds_nan
def test_equal_numbers_outside_0_to_1_are_not_probabilities():
    """Such numbers make even a divergence NaN, although it is 0 for equal probabilities."""
    beyond = np.float32([1.5, -0.5])
    assert np.isnan(jce.binary_kl_divergence(beyond, beyond)).all()
    assert np.isnan(jce.generalized_kl_divergence(beyond[1:], beyond[1:]))
