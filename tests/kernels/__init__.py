"""The table of functions, and the helpers that tests need to use its rows."""

from tests.kernels import formulas
from tests.kernels.formulas import BETA, SMOOTHING, Z_LOSS, kl_divergence, sigmoid, softmax, surprisals, weighted
from tests.kernels.functions import at_beta
from tests.kernels.kernel import LOG_Z, LOGIT, TAIL, Corner, Kernel, label
from tests.kernels.modes import MODES, easy, gradient, modes, op_by_op, total
from tests.kernels.of_heads import HEADS
from tests.kernels.samplers import INF, binary_regimes, logit_rows, probability_regimes
from tests.kernels.table import (
    KERNELS,
    OF_LOGITS,
    ROWS,
    TABLE,
    WITH_CLASSES,
    each_function,
    each_kernel,
    each_of_logits,
    each_with_classes,
)

__all__ = [
    "BETA",
    "HEADS",
    "INF",
    "KERNELS",
    "LOGIT",
    "LOG_Z",
    "MODES",
    "OF_LOGITS",
    "ROWS",
    "SMOOTHING",
    "TABLE",
    "TAIL",
    "WITH_CLASSES",
    "Z_LOSS",
    "Corner",
    "Kernel",
    "at_beta",
    "binary_regimes",
    "each_function",
    "each_kernel",
    "each_of_logits",
    "each_with_classes",
    "easy",
    "formulas",
    "gradient",
    "kl_divergence",
    "label",
    "logit_rows",
    "modes",
    "op_by_op",
    "probability_regimes",
    "sigmoid",
    "softmax",
    "surprisals",
    "total",
    "weighted",
]
