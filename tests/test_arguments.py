"""Accepted arguments (dtypes, numbers, lists, axes and masks), and the errors for all others."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jce
from tests.kernels import OF_LOGITS, TABLE, each_function, each_with_classes, easy, gradient, total

NAN = float("nan")

# dtypes


@each_function
def test_result_and_gradient_dtypes(kernel):
    """Results are float32 or wider, gradients have the argument's dtype, and different dtypes promote."""
    positions = tuple(range(len(kernel.arguments)))
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            mixed = [jax.ShapeDtypeStruct((4, 5), dtype if i == 0 else jnp.float32) for i in positions]
            of_result = jnp.float64 if dtype == jnp.float64 else jnp.float32
            assert jax.eval_shape(kernel.function, *mixed).dtype == of_result
            gradients = jax.eval_shape(jax.grad(total(kernel), positions), *mixed)
            assert [g.dtype for g in gradients] == [x.dtype for x in mixed]


@each_function
@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.in_turn(3, "wide")
def test_integers_bools_lists_and_numpy(kernel):
    one_hot, count = np.eye(3, dtype=np.int32), len(kernel.arguments)
    arrays = {"integers": one_hot, "bools": one_hot.astype(bool)}
    lists = {"a list of integers": one_hot.tolist(), "a list of floats": one_hot.astype(np.float32).tolist()}

    @jax.jit
    def run(arrays):
        return {name: kernel.function(*[x] * count) for name, x in (arrays | lists).items()}

    expected = jax.jit(kernel.function)(*[one_hot.astype(np.float32)] * count)
    for name, value in run(arrays).items():
        assert value.dtype == jnp.float32, name
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("x64", [False, True])
def test_python_scalars_never_widen(x64):
    with jax.enable_x64(x64):
        assert jce.binary_cross_entropy(0.25, jnp.float32(0.5)).dtype == jnp.float32
        assert jce.binary_cross_entropy(1, jnp.bfloat16(0.5)).dtype == jnp.float32
        assert jce.binary_entropy(0.25).dtype == (jnp.float64 if x64 else jnp.float32)
        assert jce.binary_entropy(jnp.int32(1)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn])
def test_narrow_floats(dtype):
    """Floats of less than 16 bits are rejected: the value would be right, but most of the gradient would be 0."""
    wide, labels = np.ones((2, 3), np.float32), np.zeros(2, int)

    def refuses(function, name, *arguments, **options):
        wants = f"^{function.__name__}: .*{name}.* at least 16 bits.*{name}: {np.dtype(dtype)}.*{name}.astype"
        with pytest.raises(TypeError, match=wants):
            function(*arguments, **options)

    for kernel in TABLE:
        for i, name in enumerate(kernel.arguments):
            arguments = [wide] * len(kernel.arguments)
            arguments[i] = wide.astype(dtype)
            refuses(kernel.function, name, *arguments)
    refuses(jce.check_distribution, "p", wide.astype(dtype))
    for function in (jce.linear_cross_entropy, jce.linear_log_probs):
        for name, x in {"bias": [1], "temperature": [1, 1], "logit_soft_cap": 1}.items():
            refuses(function, name, labels, wide, wide[:1], **{name: np.asarray(x, dtype)})
        refuses(function, "hidden", labels, wide.astype(dtype), wide)
        refuses(function, "head", labels, wide, wide.astype(dtype))
    for name, x in {"weights": [1, 1], "z_loss": 1, "label_smoothing": 1}.items():
        refuses(jce.linear_cross_entropy, name, labels, wide, wide, **{name: np.asarray(x, dtype)})
    probs = np.ones((2, 1), dtype)
    refuses(jce.linear_cross_entropy, "label_probs", labels[:, None], wide, wide, label_probs=probs)
    refuses(jce.cross_entropy_with_integer_labels, "label_probs", labels[:, None], wide, label_probs=probs)
    for of_linear in ({"hidden": wide.astype(dtype), "head": wide}, {"hidden": wide, "head": wide.astype(dtype)}):
        with pytest.raises(TypeError, match=r"linear_map: arguments\[0\].h.* at least 16 bits"):
            jce.linear_map(jnp.max, jce.Linear(**of_linear))


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8"])
def test_narrow_integers(dtype):
    """Narrow integers are accepted as labels and quantized heads, since they are exact and have no gradient."""
    labels, head = np.array([3, 0]), np.arange(12).reshape(4, 3) % 7
    narrow = jce.linear_cross_entropy(jnp.asarray(labels, dtype), ones(2, 3), jnp.asarray(head, dtype))
    assert narrow == jce.linear_cross_entropy(labels, ones(2, 3), head.astype(np.float32))


@pytest.mark.parametrize("kernel", [k for k in TABLE if len(k.arguments) == 2], ids=lambda kernel: kernel.name)
def test_broadcasting(kernel, rng):
    p, q = easy(kernel, rng, (3, 4, 5))
    pairs = [(p[0, 0], q), (p[:, :1], q[0])]
    run = jax.jit(lambda pairs: [kernel.function(*pair) for pair in pairs])
    for value, expected in zip(run(pairs), run([np.broadcast_arrays(*pair) for pair in pairs]), strict=True):
        np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert jax.eval_shape(gradient(kernel), p[0, 0], q)[0].shape == (5,)


@pytest.mark.parametrize(("dtype", "n"), [(np.uint8, 300), (np.int16, 40_000), (np.uint16, 70_000)])
@pytest.mark.slow
def test_labels_whose_dtype_cannot_count_the_classes(dtype, n, rng):
    """Value and gradient for a dtype's largest label, and for half of it, with more classes than a dtype can count."""
    labels = np.array([1, 1 / 2]) * np.iinfo(dtype).max
    logits = rng.standard_normal((2, n)).astype(np.float32)

    def losses(labels, logits):
        linear = jce.linear_cross_entropy(labels, np.ones((2, 1), np.float32), logits[0][:, None], reduction="none")
        return jce.cross_entropy_with_integer_labels(labels, logits) + linear

    def program(labels):
        return jax.jit(lambda x: (losses(labels, x), jax.grad(lambda x: losses(labels, x).sum())(x)))(logits)

    narrow, wide = program(labels.astype(dtype)), program(labels.astype(np.int32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), narrow, wide)


# axis and where


@each_with_classes
@pytest.mark.in_turn(2, "wide")
def test_axis(kernel, rng):
    """Value and gradient along axes other than the last. Negative and positive numbers of an axis are equivalent."""
    arguments, axes = easy(kernel, rng, (2, 3, 4, 5)), (0, 2)
    moved = {axis: [np.moveaxis(x, -1, axis) for x in arguments] for axis in axes}

    @jax.jit
    def run(moved):
        along = {axis: functools.partial(kernel.function, axis=axis) for axis in moved}
        values = {axis: along[axis](*x) for axis, x in moved.items()}
        return values, {axis: jax.grad(lambda *x, f=along[axis]: f(*x).sum())(*x) for axis, x in moved.items()}

    values, gradients = run(moved | {-1: arguments})
    expected, expected_gradient = values[-1], gradients[-1]
    for axis in axes:
        np.testing.assert_allclose(values[axis], expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(np.moveaxis(gradients[axis], axis, -1), expected_gradient, rtol=1e-6, atol=1e-7)

    def program(axis):
        return str(jax.make_jaxpr(functools.partial(kernel.function, axis=axis))(*arguments))

    assert [program(axis) for axis in range(4)] == [program(axis - 4) for axis in range(4)]


@each_with_classes
@pytest.mark.in_turn(2, "wide")
def test_where_masks_classes(kernel, rng):
    """Value and gradient equal those for the kept classes alone, even if a masked class holds NaN."""
    arguments, positions = easy(kernel, rng, (4, 6)), tuple(range(len(kernel.arguments)))
    mask = np.array([True, False, True, True, False, False])
    kept = [x[:, mask] for x in arguments]
    expected_value, expected_gradients = jax.jit(lambda *x: (kernel.function(*x), gradient(kernel)(*x)))(*kept)

    def masked(*x):
        return kernel.function(*x, where=mask)

    @jax.jit
    def run(*x):
        reverse = jax.grad(lambda *x: masked(*x).sum(), positions)(*x)
        return masked(*x), reverse, jax.vmap(jax.jacfwd(masked, positions))(*x)

    for garbage in (0.0, np.nan, -7.0, np.inf):
        value, reverse, forward = run(*(np.where(mask, x, np.float32(garbage)) for x in arguments))
        np.testing.assert_allclose(value, expected_value, rtol=1e-6)
        for argument, g, f, expected in zip(kernel.arguments, reverse, forward, expected_gradients, strict=True):
            near_0 = 1e-7 * float(np.abs(expected).max())
            close = {"rtol": 1e-6, "atol": near_0, "err_msg": argument}
            np.testing.assert_allclose(g[:, mask], expected, **close)
            np.testing.assert_array_equal(g[:, ~mask], np.zeros((4, 3)), err_msg=argument)
            np.testing.assert_allclose(f, g, **close)


@each_with_classes
@pytest.mark.in_turn(3, "wide")
def test_where_masks_rows(kernel, rng):
    """With where=mask[..., None], a masked row has loss 0 and gradient 0, even if it holds NaN."""
    arguments, mask = easy(kernel, rng, (4, 6)), np.array([True, False, True, True])
    for x in arguments:
        x[1] = np.nan

    def losses(*x):
        values = kernel.function(*x, where=mask[..., None])
        return values.sum(), values

    g, value = jax.jit(jax.grad(losses, has_aux=True))(*arguments)
    assert value[1] == 0
    np.testing.assert_allclose(value[mask], jax.jit(kernel.function)(*(x[mask] for x in arguments)), rtol=1e-6)
    np.testing.assert_array_equal(g[1], np.zeros(6))
    assert np.isfinite(g).all()


# Errors: each names the function, its requirement, the argument that it got, and a fix


def complains(error, function, *arguments, wants, got, do, **options):
    with pytest.raises(error, match=f"^{function.__name__}: ") as info:
        function(*arguments, **options)
    for text in (wants, got, do):
        assert text in str(info.value), str(info.value)
    assert function.__name__ in [entry.name for entry in info.traceback]
    with pytest.raises(error):
        jax.eval_shape(lambda *x: function(*x, **options), *arguments)


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


@each_function
def test_complex(kernel):
    arguments = [ones(2, dtype=jnp.complex64) for _ in kernel.arguments]
    first = kernel.arguments[0]
    complains(
        TypeError,
        kernel.function,
        *arguments,
        wants=f"{' and '.join(kernel.arguments)} must be real",
        got=f"got {first}: complex64[2]",
        do="Convert to real numbers first",
    )


@each_function
def test_not_an_array(kernel):
    for wrong in (None, {"a": 1.0}):
        arguments = [wrong, *(ones(2) for _ in kernel.arguments[1:])]
        first = kernel.arguments[0]
        complains(
            TypeError,
            kernel.function,
            *arguments,
            wants=f"{first} must be an array, a number or nested lists of numbers of equal lengths",
            got=f"got {first}: {type(wrong).__name__}",
            do="Pass a value that jnp.asarray accepts",
        )


@each_function
def test_text(kernel):
    """JAX's own error for a string would name neither the function nor what it accepts."""
    first, *rest = kernel.arguments
    wants = f"^{kernel.function.__name__}: {first} must be an array.*got {first}: str. Pass a value"
    with pytest.raises(TypeError, match=wants):
        kernel.function("text", *(ones(2) for _ in rest))


@each_with_classes
def test_scalar_for_a_distribution(kernel):
    arguments = [ones() for _ in kernel.arguments]
    complains(
        ValueError,
        kernel.function,
        *arguments,
        wants="must have a class axis",
        got=f"{kernel.arguments[-1]}: float32[]",
        do="binary functions",
    )


@each_with_classes
def test_axis_out_of_range(kernel):
    arguments = [ones(2, 3) for _ in kernel.arguments]
    for axis in (2, -3):
        complains(
            ValueError,
            kernel.function,
            *arguments,
            axis=axis,
            wants="axis must be from -2 to 1",
            got=f"got axis={axis} with {kernel.arguments[0]}: float32[2,3]",
            do="Name the axis that holds the classes",
        )


@each_with_classes
def test_an_axis_that_is_not_an_int(kernel):
    arguments = [ones(2, 3) for _ in kernel.arguments]
    for axis in ((0, 1), 1.0, True, None):
        complains(
            ValueError,
            kernel.function,
            *arguments,
            axis=axis,
            wants="axis must be one int",
            got=f"got axis={axis!r}",
            do="reshape them into one first",
        )


two_distributions = pytest.mark.parametrize(
    ("function", "a", "b"),
    [(kernel.function, *kernel.arguments) for kernel in TABLE if kernel.has_classes and len(kernel.arguments) == 2],
)


@two_distributions
@pytest.mark.parametrize("n", [1, 4])
def test_different_numbers_of_classes(function, a, b, n):
    complains(
        ValueError,
        function,
        ones(2, 3),
        ones(2, n),
        wants=f"{a} and {b} must have the same number of classes along axis=-1, which is never broadcast",
        got=f"got {a}: float32[2,3], {b}: float32[2,{n}]",
        do="axis=",
    )


@two_distributions
def test_a_class_axis_is_never_broadcast(function, a, b):
    complains(
        ValueError,
        function,
        ones(3),
        ones(2, 3),
        axis=0,
        wants=f"{a} and {b} must each have the class axis",
        got=f"got axis=0 of the broadcast shape with {a}: float32[3], {b}: float32[2,3]",
        do="Add the missing axis",
    )


@two_distributions
@pytest.mark.in_turn(9)
def test_axis_refers_to_the_broadcast_shape(function, a, b):
    p, q = np.full((2, 3), 1 / 3, np.float32), np.full(3, 1 / 3, np.float32)
    np.testing.assert_array_equal(function(p, q, axis=1), function(p, p))
    np.testing.assert_array_equal(function(q, p, axis=1), function(p, p))


@two_distributions
def test_batches_that_do_not_broadcast(function, a, b):
    complains(
        ValueError,
        function,
        ones(4, 3),
        ones(2, 3),
        wants=f"the batch axes of {a} and {b} must broadcast",
        got=f"got {a}: float32[4,3], {b}: float32[2,3]",
        do="Add axes of length 1",
    )


@pytest.mark.parametrize("function", [jce.binary_cross_entropy, jce.binary_kl_divergence])
def test_shapes_that_do_not_broadcast(function):
    complains(
        ValueError,
        function,
        ones(4),
        ones(3),
        wants="the shapes of alpha and beta must broadcast",
        got="got alpha: float32[4], beta: float32[3]",
        do="Add axes of length 1",
    )


def test_ignore_index_of_other_libraries():
    labels, hidden, head = np.zeros(2, int), ones(2, 4), ones(3, 4)
    of_rows, of_tokens = r"\(labels != index\)\[..., None\]", "labels != index"
    for function, arguments, where in (
        (jce.cross_entropy_with_integer_labels, (labels, ones(2, 3)), of_rows),
        (jce.linear_cross_entropy, (labels, hidden, head), of_tokens),
        (jce.linear_log_probs, (labels, hidden, head), of_tokens),
    ):
        message = rf"{function.__name__}: no argument 'ignore_index'; it takes labels, .* with where={where}\."
        with pytest.raises(TypeError, match=message):
            function(*arguments, ignore_index=-100)


def test_option_names_of_other_libraries():
    """The error suggests a replacement if there is one. It never suggests an option that the function rejects too."""
    of = {
        jce.cross_entropy_with_integer_labels: (np.zeros(2, int), ones(2, 3)),
        jce.kl_divergence: (ones(2, 3), ones(2, 3)),
        jce.binary_entropy: (ones(2),),
        jce.linear_cross_entropy: (np.zeros(2, int), ones(2, 4), ones(3, 4)),
        jce.linear_kl_divergence: (jce.Linear(ones(2, 4), ones(3, 4)),) * 2,
        jce.linear_log_probs: (np.zeros(2, int), ones(2, 4), ones(3, 4)),
    }
    for function, option, hint in (
        (jce.cross_entropy_with_integer_labels, "mask", "where=mask[..., None]"),
        (jce.cross_entropy_with_integer_labels, "weights", "Multiply the result"),
        (jce.cross_entropy_with_integer_labels, "weight", "by weight for a weight per row, by weight[labels] for one"),
        (jce.cross_entropy_with_integer_labels, "reduction", ".mean()"),
        (jce.kl_divergence, "mask", "where=mask[..., None]"),
        (jce.kl_divergence, "weight", "Multiply the result by weight."),
        (jce.kl_divergence, "ignore_index", None),
        (jce.binary_entropy, "mask", "jnp.where(mask, "),
        (jce.binary_entropy, "where", "jnp.where(where, "),
        (jce.linear_cross_entropy, "mask", "where=mask."),
        (jce.linear_cross_entropy, "weight", "weights=weight for a weight per token, weights=weight[labels] for one"),
        (jce.linear_kl_divergence, "weight", "Write weights=weight."),
        (jce.linear_cross_entropy, "axis", None),
        (jce.linear_log_probs, "weights", "Multiply a field of the result instead"),
        (jce.linear_log_probs, "weight", "such as result.log_prob, by weight for a weight per token"),
        (jce.linear_log_probs, "reduction", ".sum() of a field, such as result.log_prob"),
    ):
        with pytest.raises(TypeError, match=f"^{function.__name__}: no argument '{option}'; it takes ") as raised:
            function(*of[function], **{option: ones(2)})
        _, _, says = str(raised.value).partition(". ")
        assert (hint in says) if hint else not says


EACH, CLASSES = np.array([0.5, 2.0], np.float32), np.array([0.5, 2.0, 3.0], np.float32)


@pytest.mark.parametrize(
    ("function", "option", "given", "written", "after"),
    [
        ("cross_entropy_with_integer_labels", "weight", EACH, "", "result * weight"),
        ("cross_entropy_with_integer_labels", "weight", CLASSES, "", "result * weight[labels]"),
        ("cross_entropy_with_integer_labels", "reduction", "mean", "", "result.mean()"),
        ("cross_entropy_with_integer_labels", "ignore_index", 1, "where=(labels != index)[..., None]", ""),
        ("cross_entropy_with_integer_labels", "mask", EACH > 1, "where=mask[..., None]", ""),
        ("cross_entropy_with_integer_labels", "mask", CLASSES < 3, "where=mask", ""),
        ("linear_cross_entropy", "weight", EACH, "weights=weight", ""),
        ("linear_cross_entropy", "weight", CLASSES, "weights=weight[labels]", ""),
        ("linear_cross_entropy", "ignore_index", 1, "where=labels != index", ""),
        ("linear_kl_divergence", "weight", EACH, "weights=weight", ""),
        ("linear_kl_divergence", "mask", EACH > 1, "where=mask", ""),
        ("linear_log_probs", "weights", EACH, "", "result.log_prob * weights"),
        ("linear_log_probs", "weight", CLASSES, "", "result.log_prob * weight[labels]"),
        ("linear_log_probs", "reduction", "sum", "", "result.log_prob.sum()"),
        ("binary_entropy", "mask", EACH > 1, "", "jnp.where(mask, result, 0)"),
        ("binary_entropy", "weight", EACH, "", "result * weight"),
    ],
)
@pytest.mark.in_turn(4, "wide")
def test_following_a_hint(function, option, given, written, after):
    """The suggested code runs, also under jit. If the suggestion is an argument, the message contains its text."""
    labels = jnp.array([1, 0])
    arguments = {
        "cross_entropy_with_integer_labels": (labels, ones(2, 3)),
        "linear_cross_entropy": (labels, ones(2, 4), ones(3, 4)),
        "linear_kl_divergence": (jce.Linear(ones(2, 4), ones(3, 4)),) * 2,
        "linear_log_probs": (labels, ones(2, 4), ones(3, 4)),
        "binary_entropy": (jnp.array([0.5, 0.25], jnp.float32),),
    }[function]
    with pytest.raises(TypeError) as raised:
        getattr(jce, function)(*arguments, **{option: given})
    assert written in str(raised.value)
    names = {"jce": jce, "jnp": jnp, "labels": labels, option: given, "index": given, "arguments": arguments}

    def followed():
        result = eval(f"jce.{function}(*arguments, {written})", names)
        return eval(after, names | {"result": result}) if after else result

    assert np.isfinite(followed()).all()
    np.testing.assert_allclose(jax.jit(followed)(), followed(), rtol=1e-6)


# A Linear in place of an array


@pytest.mark.parametrize(
    ("name", "arguments", "fused"),
    [
        ("cross_entropy_with_integer_labels", (jnp.array([0, 1]), "x"), "jce.linear_cross_entropy, or "),
        ("log_probs_with_integer_labels", (jnp.array([0, 1]), "x"), "jce.linear_log_probs, or "),
        ("kl_divergence_with_logits", ("x", "x"), "jce.linear_kl_divergence if both are Linears, or "),
        ("kl_divergence_with_logits", (ones(2, 3), "x"), "jce.linear_kl_divergence if both are Linears, or "),
        ("jensen_shannon_divergence_with_logits", ("x", ones(2, 3)), ""),
        ("cross_entropy_with_logits", (ones(2, 3), "x"), ""),
        ("entropy_with_logits", ("x",), ""),
        ("binary_entropy_with_logits", ("x",), ""),
    ],
)
def test_a_linear_for_logits(name, arguments, fused):
    """The error names the functions that take a Linear."""
    complains(
        TypeError,
        getattr(jce, name),
        *(jce.Linear(ones(2, 4), ones(3, 4)) if isinstance(a, str) else a for a in arguments),
        wants="logits must be an array",
        got="logits: Linear. ",
        do=f"For a Linear use {fused}jce.linear_map(jce.{name}, ...) with the same positional arguments.",
    )


def test_a_linear_for_other_arguments():
    x, labels = jce.Linear(ones(2, 4), ones(3, 4)), jnp.array([0, 1])
    swapped = jce.cross_entropy_with_integer_labels, x, labels
    second = jce.linear_cross_entropy, labels, ones(2, 4), x
    for function, *arguments in ((jce.entropy, x), (jce.check_distribution, x), swapped, second):
        complains(
            TypeError,
            function,
            *arguments,
            wants="must be an array",
            got=": Linear. A Linear stands for the logits of hidden states and their head",
            do="Pass it, after the target, to jce.linear_cross_entropy, linear_log_probs or linear_kl_divergence",
        )


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (jce.cross_entropy_with_integer_labels, (jnp.array([0, 1]), "x")),
        (jce.entropy_with_logits, ("x",)),
        (jce.kl_divergence_with_logits, (np.zeros((2, 3), np.float32), "x")),
    ],
)
@pytest.mark.in_turn(3)
def test_a_linear_goes_to_linear_map(function, arguments, rng):
    h, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4), (3, 4)))

    def of(function, x):
        return function(*(x if isinstance(a, str) else a for a in arguments))

    expected = of(function, h @ w.T)
    for mapped in (jce.linear_map, jax.jit(jce.linear_map, static_argnums=0)):
        got = of(lambda *a, mapped=mapped: mapped(function, *a), jce.Linear(h, w))
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_keyword_arguments_passed_by_position():
    message = r"entropy: positional arguments are p, and keyword arguments axis=, where=; got 2 positional arguments\."
    with pytest.raises(TypeError, match=message):
        jce.entropy(ones(3), 0)
    with pytest.raises(TypeError, match=r"positional arguments are alpha; got 2 positional arguments\."):
        jce.binary_entropy(0.5, 0.5)
    with pytest.raises(
        TypeError, match=r"positional arguments are labels, hidden, head, bias, and keyword arguments label_probs=, "
    ):
        jce.linear_cross_entropy(np.zeros(2, int), ones(2, 4), ones(3, 4), ones(3), ones(2))


def test_repr_of_a_linear():
    x = jce.Linear(ones(2, 4), jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), logit_soft_cap=30.0)
    assert repr(x) == "Linear(hidden=float32[2, 4], head=bfloat16[3, 4], bias=None, logit_soft_cap=30.0)"


def test_axis_name_must_not_be_the_axis_of_a_vmap():
    """The axis of a vmap is rejected, because the gradient would silently be multiplied by the size of the axis."""
    for kernel in OF_LOGITS:
        split = jax.vmap(lambda *x, f=kernel.function: f(*x, axis_name="classes"), axis_name="classes")
        with pytest.raises(ValueError, match=r"axis_name must name an axis of the mesh.*got axis_name='classes'"):
            split(*(ones(2, 3) for _ in kernel.arguments))


@each_with_classes
def test_where_must_not_enlarge_the_batch(kernel):
    complains(
        ValueError,
        kernel.function,
        *(ones(1, 3) for _ in kernel.arguments),
        where=ones(2, 3, dtype=bool),
        wants="where must broadcast to the shape (1, 3)",
        got="got where: bool[2,3]",
        do="where=mask[..., None]",
    )


@each_with_classes
def test_where_of_a_wrong_shape_or_dtype(kernel):
    arguments = [ones(2, 3) for _ in kernel.arguments]
    for shape in ((2,), (4, 2, 3), (2, 2, 3)):
        complains(
            ValueError,
            kernel.function,
            *arguments,
            where=ones(*shape, dtype=bool),
            wants="where must broadcast to the shape (2, 3)",
            got=f"got where: bool[{','.join(map(str, shape))}], {kernel.arguments[0]}: float32[2,3]",
            do="A mask for classes has the shape (3,). For a mask of rows, with shape (2,), use where=mask[..., None].",
        )
        complains(
            ValueError,
            kernel.function,
            *arguments,
            axis=0,
            where=ones(*shape, dtype=bool),
            wants="where must broadcast to the shape (2, 3)",
            got=f"got where: bool[{','.join(map(str, shape))}], {kernel.arguments[0]}: float32[2,3]",
            do="has the shape (2, 1). For a mask of rows, with shape (3,), use where=jnp.expand_dims(mask, -2).",
        )
    complains(
        TypeError,
        kernel.function,
        *arguments,
        where=ones(2, 3),
        wants="where must be boolean",
        got="got where: float32[2,3]",
        do="where=mask != 0",
    )


# Labels


def test_float_labels():
    function = jce.cross_entropy_with_integer_labels
    for labels in (ones(2), ones(2, dtype=bool), ones(2, 3)):
        complains(
            TypeError,
            function,
            labels,
            ones(2, 3),
            wants="labels must be integers, a class index for each row",
            got=f"got labels: {labels.dtype}[{','.join(map(str, labels.shape))}], logits: float32[2,3]",
            do="cross_entropy_with_logits",
        )


def test_swapped_labels_and_logits():
    complains(
        TypeError,
        jce.cross_entropy_with_integer_labels,
        ones(2, 3),
        ones(2, dtype=jnp.int32),
        wants="labels must be integers",
        got="got labels: float32[2,3], logits: int32[2]",
        do="The order is labels, logits",
    )


def test_labels_of_another_shape():
    for shape in ((), (3,), (2, 1), (1, 2), (2, 3)):
        complains(
            ValueError,
            jce.cross_entropy_with_integer_labels,
            ones(*shape, dtype=jnp.int32),
            ones(2, 3),
            wants="labels must have the shape of logits without the class axis, (2,)",
            got=f"got labels: int32[{','.join(map(str, shape))}], logits: float32[2,3]",
            do="jax.vmap",
        )


@pytest.mark.parametrize(("labels", "probs"), [((8,), (8, 5)), ((8, 2), (8, 5)), ((8, 5, 1), (8, 5))])
def test_label_probs_of_all_classes(labels, probs):
    """Both errors name a function that takes probabilities of all classes, and the suggested code runs."""
    names = {
        "jce": jce,
        "hidden": ones(8, 4),
        "head": ones(5, 4),
        "label_probs": ones(*probs) / 5,
        "logits": ones(8, 5),
    }
    for function, arguments, instead in (
        (jce.cross_entropy_with_integer_labels, ("logits",), "cross_entropy_with_logits(label_probs, logits)"),
        (
            jce.linear_cross_entropy,
            ("hidden", "head"),
            'linear_map(jce.cross_entropy_with_logits, label_probs, jce.Linear(hidden, head), reduction="mean")',
        ),
    ):
        complains(
            ValueError,
            function,
            ones(*labels, dtype=jnp.int32),
            *(names[name] for name in arguments),
            label_probs=names["label_probs"],
            wants="labels and label_probs must both have the shape of",
            got="label_probs: float32[8,5]",
            do=instead,
        )
        np.testing.assert_allclose(eval(f"jce.{instead}", names), np.log(5), rtol=1e-6)


def test_label_smoothing():
    for wrong in (-0.1, 1.1, NAN, True, None, "0.1"):
        complains(
            ValueError,
            jce.cross_entropy_with_integer_labels,
            ones(2, dtype=jnp.int32),
            ones(2, 3),
            label_smoothing=wrong,
            wants="label_smoothing must be a number from 0 to 1",
            got=f"got label_smoothing={wrong!r}",
            do="such as 0.1",
        )


# Options: static ones and numbers

H, W, LOGITS, LABELS = ones(2, 4), ones(3, 4), ones(2, 3), jnp.array([0, 1])
X = jce.Linear(H, W)
OF_LABELS = (jce.cross_entropy_with_integer_labels, LABELS, LOGITS), (jce.log_probs_with_integer_labels, LABELS, LOGITS)
OF_HEADS = (jce.linear_cross_entropy, LABELS, H, W), (jce.linear_log_probs, LABELS, H, W)
OF_LINEARS = (jce.linear_kl_divergence, X, X), (jce.linear_map, jnp.max, X)
BOOL, SIZE = "must be a static bool", "chunk_size must be"
OPTIONS = {
    "tail": ((*OF_LABELS, *OF_HEADS), (1, 0, "yes", None), BOOL),
    "has_aux": (OF_LINEARS[1:], (1, {}, None, np.ones(2)), BOOL),
    "batch_invariant": ((*OF_HEADS, *OF_LINEARS), (0, "no", None), BOOL),
    "chunk_size": ((*OF_HEADS, *OF_LINEARS), (True, "8", 8.0, [8], np.ones(2)), SIZE),
    "reduction": ((OF_HEADS[0], *OF_LINEARS), (["mean"], None, 0), "reduction must be"),
    "precision": ((*OF_HEADS, *OF_LINEARS), ("hihgest", 32, False, ("default", None, 1)), "precision must be"),
    "axis_name": ((*OF_HEADS, *OF_LINEARS), (["data"], (["data"],), 0, "nowhere"), "axis_name must"),
    "axis": (((jce.check_distribution, LOGITS),), (np.ones(2, int), jnp.float32(1), "0", None), "axis must be one int"),
    "atol": (((jce.check_distribution, LOGITS / 3),), ("x", [0.1], True, np.ones(2), 1j), "atol must be a number"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_static_options(option):
    calls, values, wants = OPTIONS[option]
    for function, *arguments in calls:
        for value in values:
            with pytest.raises(ValueError, match=f"^{function.__name__}: .*{wants}.*got {option}[=:]"):
                function(*arguments, **{option: value})


class Parameter:
    """An array to JAX that can't be hashed, like flax's parameters."""

    __hash__ = None

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value == other.value

    def __jax_array__(self):
        return self.value


NUMBERS = {
    "label_smoothing": (OF_LABELS[0], OF_HEADS[0]),
    "z_loss": (OF_LABELS[0], OF_HEADS[0]),
    "temperature": (*OF_HEADS, OF_LINEARS[0]),
    "logit_soft_cap": OF_HEADS,
    "beta": ((jce.jensen_shannon_divergence, LOGITS / 3, LOGITS / 3),),
}


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.in_turn(3)
def test_numbers_that_are_parameters(option):
    """Objects with `__jax_array__` are accepted and can be differentiated. Other objects raise an error of jce."""
    for function, *arguments in NUMBERS[option]:

        def of(number, function=function, arguments=arguments):
            return sum(x.sum() for x in jax.tree.leaves(function(*arguments, **{option: number})))

        number = jnp.float32(0.5)
        assert jax.value_and_grad(lambda t, of=of: of(Parameter(t)))(number) == jax.value_and_grad(of)(number)
        for wrong in ({}, object(), ["half"]):
            with pytest.raises((TypeError, ValueError), match=f"^{function.__name__}: {option} must be "):
                of(wrong)


@pytest.mark.parametrize("option", ["z_loss", "temperature", "logit_soft_cap"])
def test_numbers_out_of_range(option):
    """The error states the bound at 0. It states float32's range only for numbers outside of that range."""
    or_zero = option == "z_loss"
    bound, zero = ("at least 0", "0, or ") if or_zero else ("greater than 0", "")
    for value, wants in (
        (-1, bound),
        (-1e-40, bound),
        (-math.inf, bound),
        *(() if or_zero else ((0, bound), (0.0, bound), (np.float32(0), bound))),
        (NAN, f"a number that is {bound}"),
        ("1", f"a number that is {bound}"),
        (True, f"a number that is {bound}"),
        *((x, f"{zero}from 1.2e-38 to 3.4e+38, beyond which float32 rounds") for x in (1e-40, 1e39, math.inf)),
    ):
        for function, *arguments in NUMBERS[option]:
            complains(
                ValueError,
                function,
                *arguments,
                **{option: value},
                wants=f": {option} must be {wants}",
                got=f"got {option}={value!r}",
                do=f"Omit {option} to switch it off",
            )


def test_a_soft_cap_that_is_a_parameter():
    def of(cap):
        return jce.linear_map(jnp.sum, jce.Linear(H, W, logit_soft_cap=cap), reduction="sum")

    assert jax.jit(of)(jnp.float32(0.5)) == jax.jit(lambda t: of(Parameter(t)))(jnp.float32(0.5))
