"""Costs that don't depend on the computer: temporaries of compiled programs, and dispatches of an eager call."""

import jax
import numpy as np
import pytest

import jce
from tests.kernels import ROWS, TABLE, each_function, easy, gradient
from tests.optimized_jit import optimized_jit

pytestmark = pytest.mark.needs_jit


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA fused less into its reductions")
@pytest.mark.parametrize("shape", [(256, 1000), (4096, 10)])
@pytest.mark.parametrize("kernel", [ROWS["entropy"], ROWS["cross_entropy"]], ids=lambda kernel: kernel.name)
def test_value_and_gradient_need_no_temporary_of_the_inputs_size(kernel, shape):
    """On a CPU the entropies read their input and write the gradient, with no other array of that size."""
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for _ in kernel.arguments]
    for position in range(len(arguments)):
        function = jax.value_and_grad(lambda *x: kernel.function(*x).mean(), position)
        for program in (kernel.function, function):
            temporaries = optimized_jit(program).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
            assert temporaries < 4 * shape[0]  # less than even one number per row


# How many temporary arrays of the inputs' size are allowed: for the value alone, and for value and gradient
STORED = {
    jce.kl_divergence: (1, 1),
    jce.generalized_kl_divergence: (1, 1),
    # two arrays of exponentials and two masks, or arrays made from them
    jce.kl_divergence_with_logits: (1, 2.25 if jax.__version_info__ < (0, 12) else 3),
    jce.entropy_with_logits: (0, 0),
    jce.binary_entropy: (0, 1),
    jce.binary_cross_entropy: (0, 1),
    jce.binary_kl_divergence: (0, 2),
    jce.sampled_kl_divergence: (0, 1),
    jce.binary_entropy_with_logits: (0, 1),
    jce.binary_cross_entropy_with_logits: (0, 1),
    jce.binary_kl_divergence_with_logits: (0, 1),
}


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="XLA fused less")
@pytest.mark.parametrize("function", STORED, ids=lambda function: function.__name__)
@pytest.mark.in_turn(4)
def test_number_of_temporaries(function):
    """On a CPU, programs don't store every quotient or exponential that they use twice or for value and gradient."""
    kernel = next(k for k in TABLE if k.function is function)
    shape = (1024, 1000) if kernel.has_classes else (1024 * 1000,)
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for _ in kernel.arguments]
    value, beside_gradient = STORED[function]
    for position in range(len(arguments)):
        both = jax.value_and_grad(lambda *x: function(*x).sum(), position)
        for program, most in ((function, value), (both, beside_gradient)):
            temporaries = optimized_jit(program).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
            assert temporaries < (most + 0.1) * 4 * 1024 * 1000


@pytest.mark.parametrize("kernel", [k for k in TABLE if len(k.arguments) == 2], ids=lambda kernel: kernel.name)
def test_an_argument_that_is_not_differentiated_costs_nothing(kernel, rng):
    p, q = easy(kernel, rng, (4, 5))
    one = str(jax.make_jaxpr(lambda q: jax.jvp(lambda q: kernel.function(p, q), (q,), (q,)))(q))
    both = str(jax.make_jaxpr(lambda p, q: jax.jvp(kernel.function, (p, q), (p, q)))(p, q))
    assert both.count("mul0") > one.count("mul0")


@each_function
def test_an_eager_call_is_one_dispatch(kernel, rng):
    """An eager call is one jitted call with the function's name. Programs of derivatives have that name too."""
    arguments = easy(kernel, rng, (4, 5))
    equations = jax.make_jaxpr(kernel.function)(*arguments).eqns
    (equation,) = [e for e in equations if e.params.get("name") == kernel.name]
    assert len(equations) == 1 or kernel.name == "log_probs_with_integer_labels"  # its table row also selects an entry
    assert equation.params["jaxpr"].eqns
    assert kernel.name in str(jax.make_jaxpr(gradient(kernel))(*arguments))


@pytest.mark.parametrize("function", [jce.linear_cross_entropy, jce.linear_log_probs])
def test_an_eager_call_with_a_head_is_one_dispatch(function):
    call = jax.make_jaxpr(lambda h, w: function(np.zeros(4, int), h, w))(np.zeros((4, 2)), np.zeros((3, 2)))
    (equation,) = call.eqns
    assert equation.params["name"] == function.__name__
