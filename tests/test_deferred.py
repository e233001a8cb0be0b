"""A head that isn't run where a model calls it: the model gives a `Linear`, which does what logits would or says no."""

import dataclasses
import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jce

B, S, D, N = 3, 6, 4, 10
ce = jce.cross_entropy_with_integer_labels


class Head:
    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, h, scale=1.0):
        return scale * (h @ self.kernel)


class Child(Head):
    """Whose method is its parent's."""


class OfOneState(Head):
    def __call__(self, h):
        return self.kernel.T @ h


class Model:
    """Which casts its logits, and returns them beside something else."""

    def __init__(self, p, head=Head):
        self.table, self.head = p["table"], head(p["kernel"])

    def decode(self, h, /, *, scale):
        return scale * (h @ self.table.T)

    def states(self, tokens):
        return jnp.tanh(self.table[tokens])

    def __call__(self, tokens):
        with jax.default_matmul_precision("float32"):
            return jnp.astype(self.head(self.states(tokens), 2.0), jnp.float32), "cache"

    def tied(self, tokens):
        return self.decode(self.states(tokens), scale=0.5).astype(jnp.float32)

    def vmapped(self, tokens):
        return jax.vmap(self.head)(self.states(tokens))


@pytest.fixture
def p(rng):
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in {"table": (N, D), "kernel": (D, N)}.items()}


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, N, (B, S)), jnp.int32)


def close(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def logits(p, tokens):
    """Of each way in which a model may call its head."""
    model, of_one = Model(p), Model(p, OfOneState)
    return [model(tokens)[0], model.tied(tokens), jax.vmap(of_one.vmapped)(tokens)]


def linears(p, tokens):
    model, of_one = Model(p), Model(p, OfOneState)
    with jce.deferred(model.head), jce.deferred(model, "decode"), jce.deferred(of_one.head):
        return [model(tokens)[0], model.tied(tokens), jax.vmap(of_one.vmapped)(tokens)]


def test_the_loss_of_what_a_model_gives(p, tokens):
    """And its gradient: of the next tokens, some left out, and under a soft cap."""
    y, where = tokens[:, 1:], tokens[:, 1:] < 7

    def ours(p):
        losses = []
        for x in linears(p, tokens):
            x = dataclasses.replace(x[:, :-1], logit_soft_cap=2.0)
            losses.append(jce.linear_cross_entropy(y, x, where=where, chunk_size=4))
        return sum(losses), losses

    def dense(p):
        capped = [2 * jnp.tanh(x[:, :-1] / 2) for x in logits(p, tokens)]
        losses = [jnp.where(where, ce(y, x), 0).sum() / where.sum().astype(x.dtype) for x in capped]
        return sum(losses), losses

    close(*(jax.jit(jax.value_and_grad(f, has_aux=True))(p) for f in (ours, dense)))


@pytest.mark.slow
def test_picking_tokens(p, tokens):
    x, dense = linears(p, tokens)[0], logits(p, tokens)[0]
    for index in (-1, slice(2), (slice(None), -1), (1, slice(1, None, 2)), (slice(None), slice(-1), slice(None)), ()):
        np.testing.assert_allclose(2 * x[index].hidden @ p["kernel"], dense[index], rtol=1e-5)


def test_the_head_is_traced_where_the_model_calls_it(p, tokens):
    x = linears(p, tokens)[0]
    (product,) = [e for e in x.head.jaxpr.eqns if e.primitive is jax.lax.dot_general_p]
    assert {*product.params["precision"]} == {jax.lax.Precision.HIGHEST}
    assert x.astype(jnp.float32) is x


def test_what_is_deferred(p):
    """This very object's calls, however contexts nest; and then the class is what it was."""
    h, before, astype = jnp.ones((2, D), np.float32), {**vars(Head)}, jnp.astype
    head, other = Child(p["kernel"]), Child(p["kernel"])

    def is_deferred(*heads):
        return [isinstance(head(h), jce.Linear) for head in heads]

    for _ in range(2):
        with jce.deferred(head):
            assert is_deferred(head, other) == [True, False]
            with jce.deferred(other), jce.deferred(head):
                assert is_deferred(head, other) == [True, True]
            assert is_deferred(head, other, Head(p["kernel"])) == [True, False, False]
        assert is_deferred(head, other) == [False, False]
        assert "__call__" not in vars(Child)
    with pytest.raises(ZeroDivisionError), jce.deferred(other), jce.deferred(Head(p["kernel"])):
        raise ZeroDivisionError
    assert {**vars(Head)} == before
    assert "__call__" not in vars(Child)
    assert jnp.astype is astype


def test_threads(p):
    """Each has its own contexts, and may leave them in any order."""
    h, heads = jnp.ones((2, D), np.float32), [Child(p["kernel"]) for _ in range(2)]
    turns, found = [threading.Event() for _ in range(3)], []

    def run():
        turns[0].wait(60)
        with jce.deferred(heads[1]):
            found.append([isinstance(head(h), jce.Linear) for head in heads])
            turns[1].set()
            turns[2].wait(60)
            found.append([isinstance(head(h), jce.Linear) for head in heads])

    thread = threading.Thread(target=run)
    thread.start()
    with jce.deferred(heads[0]):
        turns[0].set()
        turns[1].wait(60)
        found.append([isinstance(head(h), jce.Linear) for head in heads])
    turns[2].set()
    thread.join()
    assert found == [[False, True], [True, False], [False, True]]
    assert "__call__" not in vars(Child)


REFUSED = {
    "division": lambda x: x / 30.0,
    "an array's product": lambda x: jnp.ones(N, np.float32) * x,
    "a product with NumPy's": lambda x: np.ones(N, np.float32) * x,
    "comparison": lambda x: x == x,
    "unpacking": lambda x: [*x],
    "jnp.tanh": jnp.tanh,
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "jnp.argmax": jnp.argmax,
    "log_softmax": jax.nn.log_softmax,
    "jnp.where": lambda x: jnp.where(True, x, 0.0),
    "a method": lambda x: x.mean(),
    "shape": lambda x: x.shape,
    "another dtype": lambda x: x.astype(jnp.bfloat16),
    "jnp.astype": lambda x: jnp.astype(x, jnp.float16),
    "classes": lambda x: x[..., :3],
    "a class": lambda x: x[0, 0, 0],
    "a mask": lambda x: x[np.ones((B, S), bool)],
}


def test_computing_with_it_is_refused(p, tokens):
    model = Model(p)
    with jce.deferred(model.head):
        x = model(tokens)[0]
        for name, compute in REFUSED.items():
            with pytest.raises(TypeError, match=r"Linear: it stands for logits .* got Linear\(hidden=float32\[3, 6,"):
                raise AssertionError(f"{name}: {compute(x)}")
    assert not hasattr(x, "shape")
    with pytest.raises(AttributeError, match="no attribute 'heads'"):
        _ = x.heads


def of_a_copy(p, tokens):
    model = Model(p)
    with jce.deferred(Head(p["kernel"])):
        return jce.linear_cross_entropy(tokens, model(tokens)[0])


def of_a_mapped_head(p, tokens):
    def of_one(kernel):
        head = Head(kernel)
        with jce.deferred(head):
            return head(p["table"][tokens])

    x = jax.vmap(of_one)(jnp.stack([p["kernel"], p["kernel"]]))
    return jce.linear_cross_entropy(jnp.stack([tokens, tokens]), x)


def calling(*arguments, method="__call__"):
    def call(p, tokens):
        head = Head(p["kernel"])
        with jce.deferred(head, method):
            return head(*arguments)

    return call


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (calling(method="decode"), r"deferred: module must be .* the method 'decode'; got module: Head"),
        (lambda p, _: jce.deferred(p["kernel"]).__enter__(), r"the method '__call__'; got module: ArrayImpl"),
        (calling(), r"deferred: hidden must be an array.*got hidden: NoneType"),
        (calling("text"), r"deferred: hidden must be an array.*got hidden: str"),
        (calling(np.ones((3, D), np.complex64)), r"deferred: hidden must be real.*complex64"),
        (
            calling(np.ones((3, D), np.float32), np.ones((N, 1, 1), np.float32)),
            r"deferred: Head.__call__ must give logits",
        ),
        (of_a_copy, r"linear_cross_entropy: head must be .*its head was another module, or a copy"),
        (of_a_mapped_head, r"must have the shapes of when it was traced.*map linear_cross_entropy too"),
    ],
)
def test_errors(p, tokens, call, text):
    with pytest.raises((TypeError, ValueError), match=text), jax.numpy_rank_promotion("allow"):
        call(p, tokens)


@pytest.mark.slow
def test_a_head_of_one_state_is_traced_as_often_as_one_likes(rng):
    """Under a vmap x closes over the head's arrays, and JAX's caches compare what they know of it: no array stays."""
    kernel = jnp.asarray(rng.standard_normal((D, N)), jnp.float32)
    h = jnp.asarray(rng.standard_normal((S, D)), jnp.float32)
    y = jnp.arange(S)

    def loss(kernel):
        head = OfOneState(kernel)
        with jce.deferred(head):
            x = jax.vmap(head)(h)
        return jce.linear_cross_entropy(y, x)

    def arrays():
        np.testing.assert_allclose(jax.grad(loss)(kernel), expected, rtol=1e-5, atol=1e-6)
        loss(kernel)
        gc.collect()
        return len(jax.live_arrays())

    expected = jax.grad(lambda kernel: ce(y, h @ kernel).mean())(kernel)
    arrays()
    assert arrays() == arrays()


def test_a_head_that_calls_another_or_itself(rng):
    """As one whose class extends another's that is deferred too: while it is traced, nothing is deferred."""

    class Shifted(Head):
        def __call__(self, h):
            return super().__call__(h) + 1.0 if h.ndim == 1 else jax.vmap(self)(h)

    kernel = jnp.asarray(rng.standard_normal((D, N)), jnp.float32)
    inner, outer, h = Head(kernel), Shifted(kernel), jnp.ones((S, D))
    with jce.deferred(inner), jce.deferred(outer):
        x = outer(h)
    np.testing.assert_allclose(jce.linear_map(lambda x: x, x), h @ kernel + 1, rtol=1e-6)


def test_contexts_left_in_any_order(rng):
    a, b = (Head(jnp.ones((D, N))) for _ in range(2))
    contexts = [jce.deferred(head) for head in (a, b)]
    for context in contexts:
        context.__enter__()
    contexts[0].__exit__(None, None, None)
    assert isinstance(b(jnp.ones((S, D))), jce.Linear)
    contexts[1].__exit__(None, None, None)
    with jce.deferred(Head(a.kernel)):
        assert isinstance(a(jnp.ones((S, D))), jax.Array)


def test_functions_are_no_modules():
    """And what can't be entered is as it was."""
    for _ in range(2):
        with pytest.raises(TypeError, match=r"jce\.Linear\(hidden, function\)"), jce.deferred(lambda h: h):
            pass


def test_tokens_by_an_ellipsis():
    x = jce.Linear(jnp.ones((B, S, D)), jnp.ones((N, D)))
    assert x[..., :-1, :].hidden.shape == x[:, :-1].hidden.shape == (B, S - 1, D)
