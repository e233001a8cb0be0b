"""Costs of heads: no mode makes an array of tokens × classes, or does more matmuls (products) than it needs."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

import jce
from jce._heads.loop.chunk_rule import RULES
from tests.jaxprs import inner
from tests.kernels import modes
from tests.optimized_jit import optimized_jit
from tests.test_package import README

pytestmark = pytest.mark.needs_jit


def matrices(tokens, d, n, dtype=np.float32):
    return jax.ShapeDtypeStruct((tokens, d), dtype), jax.ShapeDtypeStruct((n, d), dtype)


def linear_loss(tokens, **options):
    labels = np.zeros(tokens, np.int32)
    return lambda hidden, head: jce.linear_cross_entropy(labels, hidden, head, **options).mean()


# How many arrays of the head's shape each mode may need at once
HEADS = dict(zip(modes(linear_loss(1), (0, 1)), (0, 1, 2, 2, 3, 4, 4, 6), strict=True))


@pytest.mark.parametrize("mode", HEADS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.in_turn(12)
def test_no_mode_has_the_logits_of_all_tokens(mode, reduction):
    """The compiled program has no array of tokens × classes, only some chunks, heads and hidden states."""
    tokens, d, n, chunk = 1024, 16, 4096, 32
    a = matrices(tokens, d, n)
    program = modes(linear_loss(tokens, chunk_size=chunk, reduction=reduction), (0, 1))[mode]
    compiled = optimized_jit(program).lower(a, a).compile()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[(\d+(?:,\d+)+)\]", compiled.as_text())}
    assert max(map(math.prod, shapes)) < tokens * n / 8
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 4
    chunks = 14 if mode == "third order" else 6
    assert temporaries < chunks * chunk * n + HEADS[mode] * n * d + 9 * tokens * d


def products(function, *arguments, platform: str = "cpu") -> float:
    """How many matmuls of the size of hidden · headᵀ a program needs. A matmul in a loop counts once per pass."""
    (tokens, d), (n, _) = (x.shape for x in arguments[:2])
    return needed(jax.make_jaxpr(function)(*arguments).jaxpr, platform) / (tokens * d * n)


def needed(jaxpr, platform) -> int:
    return multiplications(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], platform)


def multiplications(jaxpr, platform, chunks: int | None = None) -> int:
    """How many multiplications a program does if this many chunks hold a kept token, or all chunks if None."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            count += math.prod(equation.outvars[0].aval.shape) * math.prod(
                equation.invars[0].aval.shape[i] for i in contracted
            )
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "while":  # rows that are read again (`_softmax/known_label.py`): usually none
            times = 0
        if equation.primitive.name == "first_chunks":
            # Its arguments are arrays of chunks and, if transposed, others. Here the chunks are the shortest axis.
            lengths = [x.aval.shape[0] for x in equation.invars if x.aval.ndim]
            times = min(lengths) if chunks is None else chunks
        count += times * sum(multiplications(j, platform, chunks) for j in inner(equation, platform))
    return count


@pytest.mark.parametrize("platform", ["cpu", "other"])
@pytest.mark.parametrize(
    ("reduction", "gradient", "of_hidden", "of_head", "hvp", "with_gradient", "hvp_of_one"),
    [("mean", 3, 2, 2, 7, 10, 3), ("sum", 3, 2, 2, 7, 10, 3), ("none", 4, 2, 2, 7, 9, 3)],
)
@pytest.mark.in_turn(3)
def test_number_of_matmuls(reduction, gradient, of_hidden, of_head, hvp, with_gradient, hvp_of_one, platform):
    a = matrices(64, 8, 40)
    loss = linear_loss(64, reduction=reduction, chunk_size=16)
    count = functools.partial(products, platform=platform)
    assert count(loss, *a) == 1
    assert count(jax.value_and_grad(loss, (0, 1)), *a) == gradient
    assert count(jax.grad(loss, 0), *a) == of_hidden  # a frozen head
    assert count(jax.grad(loss, 1), *a) == of_head
    assert count(lambda *a: jax.jvp(jax.grad(loss, (0, 1)), a, a)[1], *a) == hvp
    assert count(lambda *a: jax.jvp(jax.grad(loss, (0, 1)), a, a), *a) == with_gradient
    assert count(lambda h, w: jax.jvp(lambda h: jax.grad(loss)(h, w), (h,), (h,))[1], *a) == hvp_of_one
    assert count(lambda h, w: jax.jvp(lambda w: jax.grad(loss, 1)(h, w), (w,), (w,))[1], *a) == hvp_of_one


HEADS_LOSSES = {
    "losses": lambda h, w, **o: jce.linear_cross_entropy(np.zeros(64, int), h, w, **o),
    "log-probabilities": lambda h, w, **o: sum(x.sum() for x in jce.linear_log_probs(np.zeros(64, int), h, w, **o)),
    "divergence": lambda h, w, **o: jce.linear_kl_divergence(jce.Linear(2 * h, w), jce.Linear(h, w), **o),
    "map of each": lambda h, w, **o: jce.linear_map(lambda x: jnp.sin(x).sum(), jce.Linear(h, w), **o).sum(),
}


@pytest.mark.parametrize("platform", ["cpu", "other"])
@pytest.mark.parametrize("name", HEADS_LOSSES)
@pytest.mark.slow
def test_number_of_matmuls_with_masked_tokens(name, platform):
    """Each mode has as many matmuls as without a mask, all in a loop over the chunks with kept tokens."""
    a = matrices(64, 8, 40)

    def program(mode, some):
        def loss(h, w):
            return HEADS_LOSSES[name](h, w, chunk_size=16, where=h[:, 0] > 0 if some else None)

        jaxpr = jax.make_jaxpr(modes(loss, (0, 1))[mode])(a, a).jaxpr
        return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]

    for mode in HEADS:
        some = program(mode, True)
        assert multiplications(some, platform) == multiplications(program(mode, False), platform)
        assert not multiplications(some, platform, chunks=0)


def test_traced_numbers_cost_no_matmul():
    """Value and gradient take three matmuls, as with Python numbers. Derivatives with respect to numbers take two."""

    def loss(hidden, head, numbers):
        labels = np.zeros(64, np.int32)
        return jce.linear_cross_entropy(labels, hidden, head, chunk_size=16, **numbers)

    a = matrices(64, 8, 40)
    numbers = dict.fromkeys(("label_smoothing", "z_loss", "logit_soft_cap"), jax.ShapeDtypeStruct((), np.float32))
    assert products(jax.value_and_grad(loss, (0, 1)), *a, numbers) == 3
    assert products(jax.value_and_grad(loss, 2), *a, numbers) == 2


@pytest.mark.parametrize("log_normalizer", [False, True])
def test_number_of_matmuls_of_log_probs(log_normalizer):
    def statistics(hidden, head):
        of = jce.linear_log_probs(np.zeros(64, int), hidden, head, log_normalizer=log_normalizer, chunk_size=16)
        return sum(x.sum() for x in of)

    a = matrices(64, 8, 40)
    assert products(statistics, *a) == 1
    assert products(jax.value_and_grad(statistics, (0, 1)), *a) == 4


def test_metrics_with_a_loss_cost_no_matmul():
    """Value and gradient take three matmuls, also with a metric. If both results are differentiated, they take four."""

    def loss(hidden, head, **options):
        def both(x):
            return jce.entropy_with_logits(x), jnp.max(x)

        return jce.linear_map(both, jce.Linear(hidden, head), reduction="mean", chunk_size=16, **options)

    a = matrices(64, 8, 40)
    assert products(jax.value_and_grad(functools.partial(loss, has_aux=True), (0, 1), has_aux=True), *a) == 3
    assert products(jax.value_and_grad(lambda *a: sum(loss(*a)), (0, 1)), *a) == 4


@pytest.mark.parametrize(
    ("tokens", "n", "chunks"),
    [(2048, 32768, 4), (1024, 8192, 2), (100_000, 10, 1), (100_000, 100, 2), (10_000, 1000, 10), (513, 50_000, 2)],
)
def test_chunks_by_the_rule(tokens, n, chunks):
    """A chunk has as many tokens as fill 4 MiB (32 MiB for few classes), but at least 512. All have the same size."""
    text = str(jax.make_jaxpr(linear_loss(tokens))(*matrices(tokens, 2, n)))
    assert f"length={chunks}" in text
    assert f"f32[{math.ceil(tokens / chunks)},{n}]" in text


def test_chunks_of_two_heads_count_the_logits_of_both():
    """With 1,024 classes in each head, 512 tokens fill 4 MiB."""
    h, w = matrices(2048, 2, 1024)
    text = str(jax.make_jaxpr(lambda h, w: jce.linear_kl_divergence(jce.Linear(h, w), jce.Linear(2 * h, w)))(h, w))
    assert "f32[512,1024]" in text
    assert "f32[1024,1024]" not in text


TEXTS = {
    "README": README.read_text(encoding="utf-8"),
    "jce/README": (README.parent / "jce" / "README.md").read_text(encoding="utf-8"),
    "docstring": jce.linear_cross_entropy.__doc__,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_state_the_rule_for_chunks(text):
    """Each text states the rule for float32 logits, first for a CPU, then for an accelerator."""
    text = " ".join(text.split())
    said = re.findall(r"max\((\d+), 2([⁰¹²³⁴⁵⁶⁷⁸⁹]+)/n\)", text)
    powers = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    rules = RULES["cpu"], RULES["tpu"]
    assert [(int(least), 2 ** int(power.translate(powers))) for least, power in said] == [
        (rule.least_tokens, rule.chunk_bytes // 4) for rule in rules
    ]
    filled = re.findall(r"(\d+) MiB or more", text)
    assert [int(size) * 2**20 for size in filled] in ([], [rule.chunk_bytes for rule in rules])


def test_more_chunks_that_need_no_padding():
    """10⁵ tokens make 200 chunks of 500, not 196 of 512, because padding would need a copy of all hidden states."""
    tokens, d, n = 100_000, 64, 512
    program = optimized_jit(linear_loss(tokens, chunk_size=512)).lower(*matrices(tokens, d, n))
    assert "200,500,64" in program.as_text().replace("x", ",")
    assert program.compile().memory_analysis().temp_size_in_bytes < 4 * tokens * d / 4


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.slow
def test_precision_from_jax_or_from_the_keyword(dtype):
    """The precision applies to all matmuls of gradients and Hessian-vector products, also for log-probabilities."""
    highest = "precision = [HIGHEST, HIGHEST]"
    a = matrices(8, 2, 3, dtype)

    def statistics(**options):
        return lambda h, w: sum(x.sum() for x in jce.linear_log_probs(np.zeros(8, int), h, w, **options))

    def program(make, **options):
        loss = make(**options)
        return jax.jit(lambda *a: jax.jvp(jax.grad(loss, (0, 1)), a, a)).trace(*a)

    def counted(traced):
        lowered = traced.lower().as_text()
        return lowered.count("stablehlo.dot_general "), lowered

    def text(make, **options):
        return counted(program(make, **options))

    for make in (
        lambda **options: linear_loss(8, **options),
        lambda **o: linear_loss(8, reduction="none", **o),
        statistics,
    ):
        count, plain = text(make)
        assert count >= 7  # the text contains equal functions only once
        assert highest not in plain
        count, as_asked = text(make, precision="highest")
        assert as_asked.count(highest) == count >= 7
        with jax.default_matmul_precision("highest"):
            traced = program(make)
        count, as_set = counted(traced)  # lowered outside of the `with`
        assert as_set.count(highest) == count >= 7
        count, preset = text(make, precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32)
        assert preset.count("algorithm = <") == count >= 7


def test_half_precision_arrays_are_not_upcast_for_matmuls():
    text = jax.jit(linear_loss(8)).lower(*matrices(8, 2, 3, jnp.bfloat16)).as_text()
    (dot,) = [line for line in text.splitlines() if "dot_general" in line]
    assert dot.endswith("(tensor<8x2xbf16>, tensor<3x2xbf16>) -> tensor<8x3xf32>")


@pytest.mark.parametrize(("dtype", "tokens"), [(jnp.bfloat16, 1024), (np.float32, 1024), (np.float64, 512)])
def test_chunks_depend_on_the_bytes_of_logits(dtype, tokens):
    with jax.enable_x64(dtype == np.float64):
        text = str(jax.make_jaxpr(linear_loss(8192))(*matrices(8192, 2, 1024, dtype)))
    assert f"[{tokens},1024]" in text


def test_chunks_of_log_probs():
    def statistics(h, w):
        return jce.linear_log_probs(np.zeros(64, int), h, w, chunk_size=16)

    assert "length=4" in str(jax.make_jaxpr(statistics)(*matrices(64, 2, 3)))
