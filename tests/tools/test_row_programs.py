"""Passes over logits on accelerators, from programs compiled for them. Needs the extra `accelerators`.

No figure depends on the machine.
"""

import pytest

from bench import children, compilers
from bench.accelerators import MODES
from bench.roofline import DEVICES, cost
from tests.tools import compiled_rows

pytestmark = [
    pytest.mark.needs_jit,
    pytest.mark.skipif(bool(compilers.missing()), reason=f"not installed: {', '.join(compilers.missing())}"),
]
NUMBERS = 2**28  # logits: more than fit into a TPU's on-chip memory

# How many arrays of logits are read and written: value, gradient, value and gradient, Hessian-vector product
PASSES = {
    ("h100", 1024): {
        "cross_entropy_with_integer_labels": (1, 2, 3, 3),
        "cross_entropy_with_integer_labels, smoothed": (1, 2, 3, 3),
        "cross_entropy_with_integer_labels, z-loss": (1, 3, 3, 11),
        "cross_entropy_with_logits": (2, 3, 5, 4),
        "entropy_with_logits": (1, 2, 3, 3),
        "kl_divergence_with_logits": (6, 7, 7, 3),
        "kl_divergence": (2, 3, 3, 4),
        "jensen_shannon_divergence": (2, 3, 3, 4),
    },
    ("v5e", 1024): {
        "cross_entropy_with_integer_labels": (2, 4, 4, 6),
        "cross_entropy_with_integer_labels, smoothed": (2, 4, 4, 6),
        "cross_entropy_with_integer_labels, z-loss": (2, 4, 4, 7),
        "cross_entropy_with_logits": (3, 5, 6, 7),
        "entropy_with_logits": (1, 3, 3, 6),
        "kl_divergence_with_logits": (6, 7, 7, 6),
        "kl_divergence": (2, 3, 5, 4),
        "jensen_shannon_divergence": (2, 3, 3, 4),
    },
}


@pytest.mark.parametrize(("device", "classes"), PASSES)
def test_passes(device, classes):
    rows = NUMBERS // classes
    expected = {
        (function, mode): passes
        for function, of_modes in PASSES[device, classes].items()
        for mode, passes in zip(MODES, of_modes, strict=True)
    }
    found = {
        (function, mode): cost(text, DEVICES[device]).bytes / (4 * rows * classes)
        for (function, mode), text in children.lines(
            compiled_rows.__name__, (device, rows, classes), compilers.environment(), quiet=True
        )
    }
    assert found == pytest.approx(expected, rel=0.02)
