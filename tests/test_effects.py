"""Side effects of a mapped function (print, call, write): kept as in `jax.lax.map`, or rejected with jce's error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import jce
from jce._heads.arguments.effects import REPEATED

LABELS, HEAD = np.array([0, 1, 2, 3, 0, 1]), np.eye(4, 3, dtype=np.float32)
HIDDEN, NUMBERS = np.arange(18, dtype=np.float32).reshape(6, 3) / 10, np.arange(6)
SOME = np.array([True, True, False, True, False, True])
WAYS = {
    "each": {},
    "mean": {"reduction": "mean", "chunk_size": 2},
    "some": {"where": SOME, "chunk_size": 2},
    "sum": {"where": SOME, "reduction": "sum"},
}
each_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
loss = jce.cross_entropy_with_integer_labels
new_ref = jax.new_ref if hasattr(jax, "new_ref") else jax.array_ref  # JAX 0.8


def mapped(effect, **options):
    """A function of hidden states: the losses, with a side effect for each token's number."""

    def function(i, y, x):
        effect(i)
        return loss(y, x)

    return lambda h: jce.linear_map(function, NUMBERS, LABELS, jce.Linear(h, HEAD), **options)


def recorder(ordered=False):
    """A callback that records a token's number, and a function that returns the numbers and how many were repeats."""
    came = []

    def called():
        jax.effects_barrier()
        numbers, repeated = sorted({*came}), len(came) - len({*came})
        came.clear()
        return numbers, repeated

    return lambda i: io_callback(lambda i: came.append(int(i)), None, i, ordered=ordered), called


@each_way
@pytest.mark.in_turn(4, "wide")
def test_a_callback_is_called_for_each_token(options):
    effect, called = recorder()
    function = mapped(effect, **options)
    kept = NUMBERS[options.get("where", np.ones(6, bool))].tolist()
    filled = 6 - len(kept)
    assert {type(e).__name__ for e in jax.make_jaxpr(function)(HIDDEN).effects} == {"IOEffect"}
    for change in (function, jax.jit(function), jax.jit(lambda h: (function(h), h)[1])):
        jax.block_until_ready(change(HIDDEN))
        numbers, repeated = called()
        assert numbers == kept
        assert repeated <= filled  # a padded chunk repeats a kept token
    jax.block_until_ready(jax.lax.scan(lambda c, _: (c, function(HIDDEN)), 0, None, length=2))
    assert called()[0] == kept
    jax.block_until_ready(jax.vmap(function)(np.stack([HIDDEN, HIDDEN])))
    numbers, repeated = called()
    assert numbers == kept
    assert repeated >= len(kept)  # from the other batch entry


@pytest.mark.skipif(jax.__version_info__ < (0, 9), reason="JAX 0.8 has no refs in a custom_jvp function")
@each_way
@pytest.mark.slow
def test_a_ref_of_the_function_is_not_an_effect(options):
    def counted(i):
        new_ref(i)[...] += 1

    function = mapped(counted, **options)
    assert not jax.make_jaxpr(function)(HIDDEN).effects
    np.testing.assert_array_equal(jax.jit(function)(HIDDEN), jax.jit(mapped(lambda i: None, **options))(HIDDEN))


@pytest.mark.slow
def test_prints(capfd):
    function = mapped(lambda i: jax.debug.print("token {i}", i=i))
    jax.block_until_ready(jax.jit(function)(HIDDEN))
    jax.effects_barrier()
    assert sorted(capfd.readouterr().out.split("\n")) == ["", *(f"token {i}" for i in NUMBERS)]
    jax.block_until_ready(jax.jit(jax.grad(lambda h: function(h).sum()))(HIDDEN))
    jax.effects_barrier()
    assert {*capfd.readouterr().out.split("\n")} == {"", *(f"token {i}" for i in NUMBERS)}


@each_way
@pytest.mark.in_turn(4, "wide")
def test_a_callback_in_a_gradient_is_called_once_or_rejected(options):
    effect, called = recorder()
    function = mapped(effect, **options)
    for change in (lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))):
        gradient = change(lambda h: function(h).sum())
        if "reduction" in options:
            plain = jax.jit(jax.grad(mapped(lambda i: None, **options)))(HIDDEN)
            np.testing.assert_array_equal(gradient(HIDDEN), plain)
            assert called()[0] == NUMBERS[options.get("where", np.ones(6, bool))].tolist()
        else:
            with pytest.raises(
                NotImplementedError,
                match=r"^linear_map: a derivative .* must not have the effect IOEffect\. Use reduction",
            ):
                gradient(HIDDEN)
    with pytest.raises(NotImplementedError, match=r"^linear_map: a derivative"):
        jax.hessian(lambda h: function(h).sum())(HIDDEN)


@each_way
def test_jax_rejects_an_ordered_callback(options):
    effect, called = recorder(ordered=True)
    with pytest.raises(ValueError, match=r"Cannot `vmap` ordered IO callback"):
        jax.jit(mapped(effect, **options))(HIDDEN)
    assert called() == ([], 0)


def test_ordered_prints_are_kept(capfd):
    jax.block_until_ready(jax.jit(mapped(lambda i: jax.debug.print("token {i}", i=i, ordered=True)))(HIDDEN))
    jax.effects_barrier()
    assert sorted(capfd.readouterr().out.split("\n")) == ["", *(f"token {i}" for i in NUMBERS)]


def test_jax_also_repeats_the_effects_that_a_derivative_repeats():
    """jce rejects the effects that `jax.checkpoint` rejects, because JAX's own error would say less."""
    from jax._src.effects import remat_allowed_effects

    allowed = {c.__name__ for c in remat_allowed_effects._effect_types}
    assert {*REPEATED} - {"CallTfEffect", "CommsEffect"} <= allowed  # these two come with modules that aren't imported


@pytest.mark.parametrize(
    "use", [lambda r: r[...], lambda r: r.__setitem__(..., jnp.float32(1))], ids=["read", "written"]
)
def test_refs_of_the_caller_are_rejected(use):
    def closing_over(h):
        ref = new_ref(jnp.zeros((), jnp.float32))
        return mapped(lambda i: use(ref))(h)

    def shared(h):
        ref = new_ref(jnp.zeros((), jnp.float32))
        linear = jce.Linear(h, HEAD)
        return jce.linear_map(lambda y, x, ref: (use(ref), loss(y, x))[1], LABELS, linear, shared=ref)

    for function, said in (
        (closing_over, "function must not read or write a jax.Ref"),
        (shared, "function must not|shared must"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^linear_map: ({said})"):  # JAX 0.12: a Ref isn't an array
            jax.jit(function)(HIDDEN)
