"""Table rows for the `linear_*` functions, written as functions of the logits."""

from __future__ import annotations

import dataclasses

import mpmath as mp

import jce
from tests.kernels import formulas
from tests.kernels.formulas import SMOOTHING
from tests.kernels.functions import linear, mapped, of_rows, with_label_0
from tests.kernels.kernel import IMPOSSIBLE, LOG2, LOG_Z, Corner, label
from tests.kernels.of_logits import ROWS_OF_LOGITS
from tests.kernels.samplers import INF, NAN

BY_NAME = {label(kernel): kernel for kernel in ROWS_OF_LOGITS}

HEADS = [
    dataclasses.replace(
        BY_NAME["cross_entropy_with_integer_labels"],
        function=with_label_0(jce.linear_cross_entropy, reduction="sum"),
    ),
    dataclasses.replace(
        BY_NAME["cross_entropy_with_integer_labels-smoothed"],
        function=with_label_0(jce.linear_cross_entropy, reduction="mean", label_smoothing=SMOOTHING),
    ),
    dataclasses.replace(
        BY_NAME["entropy_with_logits"], function=with_label_0(jce.linear_log_probs, lambda result: result.entropy)
    ),
    dataclasses.replace(
        BY_NAME["entropy_with_logits"],
        function=with_label_0(jce.linear_log_probs, lambda result: result.log_normalizer, log_normalizer=True),
        note=LOG_Z,
        formula=formulas.log_sum,
        value_bar=2,
        value_scale=lambda x: max(abs(xi) for xi in x if mp.isfinite(xi)) + mp.log(len(x)),
        gradient_scale=(None,),
        hvp_bar=8,
        corners=[
            Corner(([0.0] * 4,), 2 * LOG2, ([0.25] * 4,)),
            Corner(([1.0, -INF, -INF, -INF],), 1.0, ([1.0, 0.0, 0.0, 0.0],)),
            Corner(([0.0, -INF, -INF, 0.0],), LOG2, ([0.5, 0.0, 0.0, 0.5],)),
            Corner(([200.0, 0.0, 0.0, -INF],), 200.0, ([1.0, 0.0, 0.0, 0.0],)),
            Corner(([3e38, -3e38, 0.0, 0.0],), 3e38, ([1.0, 0.0, 0.0, 0.0],), False),
            *[Corner((x,), NAN, ([NAN] * 4,)) for x in IMPOSSIBLE],
        ],
    ),
    dataclasses.replace(
        BY_NAME["kl_divergence_with_logits"],
        function=of_rows(lambda p, q: jce.linear_kl_divergence(linear(p), linear(q)), jce.linear_kl_divergence),
    ),
    dataclasses.replace(
        BY_NAME["cross_entropy_with_integer_labels"],
        function=mapped(lambda x: jce.cross_entropy_with_integer_labels(0, x)),
    ),
]
