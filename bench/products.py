"""Counts multiplications and additions of a compiled program's matmuls, by the dtype that the device multiplies."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from bench.programs import Array, Instruction, Unreadable, leaves

PLACES = {"AllocateBuffer", "ConcatBitcast"}  # custom calls that only place arrays in memory
NO_PRODUCTS = PLACES | {"AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"}
CUBLAS = {"__cublas$gemm", "__cublas$lt$matmul"}
ALGORITHMS = {  # the dtype that is multiplied, and how many matmuls in it make one
    "dot_bf16_bf16_f32": ("bf16", 1),
    "dot_bf16_bf16_bf16": ("bf16", 1),
    "dot_bf16_bf16_f32_x3": ("bf16", 3),
    "dot_bf16_bf16_f32_x6": ("bf16", 6),
    "dot_bf16_bf16_f32_x9": ("bf16", 9),
    "dot_f16_f16_f16": ("f16", 1),
    "dot_f16_f16_f32": ("f16", 1),
    "dot_tf32_tf32_f32": ("tf32", 1),
    "dot_tf32_tf32_f32_x3": ("tf32", 3),
    "dot_f32_f32_f32": ("f32", 1),
}


def operations(x: Instruction, platform: str) -> Counter:
    """Counts for an instruction and everything that is fused into it."""
    if x.opcode == "fusion":
        parts = x.called["calls"].instructions.values()
        return sum((operations(part, platform) for part in parts), Counter())
    if x.opcode == "dot":
        precision, algorithm = x.attribute("operand_precision"), x.attribute("algorithm")
        return _product(x, x.integers("lhs_contracting_dims"), precision, algorithm, platform)
    if x.opcode == "convolution":
        return _convolution(x, platform)
    if x.opcode == "custom-call":
        return _call(x, platform)
    return Counter()


def _product(x: Instruction, contracted: list[int], precision: str, algorithm: str, platform: str) -> Counter:
    kind, times = multiplied(x, precision, algorithm, platform)
    left = x.operands[0].shape
    return Counter({kind: times * 2 * leaves(x.shape)[0].numbers * math.prod(left.dims[i] for i in contracted)})


def _call(x: Instruction, platform: str) -> Counter:
    target = x.attribute("custom_call_target")
    if target in NO_PRODUCTS:
        return Counter()
    if target in CUBLAS:
        config = x.config["gemm_backend_config"]
        contracted = [int(n) for n in config["dot_dimension_numbers"]["lhs_contracting_dimensions"]]
        precision = config.get("precision_config", {})
        algorithm = precision.get("algorithm", "ALG_UNSET").lower().removeprefix("alg_").replace("unset", "")
        return _product(x, contracted, json.dumps(precision.get("operand_precision", [])).lower(), algorithm, platform)
    raise Unreadable(f"{x.name}: can't count the operations of the custom call {target}")


def _convolution(x: Instruction, platform: str) -> Counter:
    """A TPU's matmuls are convolutions. The batch of a batched matmul is a dimension of a dilated window, or groups."""
    left, right = (operand.shape for operand in x.operands)
    of_left, of_right, _ = re.split("_|->", x.attribute("dim_labels"))
    spatial = [c for c in of_left if c.isdigit()]
    met = [
        meetings(left.dims[of_left.index(c)], right.dims[of_right.index(c)], window)
        for c, window in zip(spatial, windows(x.attribute("window"), len(spatial)), strict=True)
    ]
    batch = left.dims[of_left.index("b")] // int(x.attribute("batch_group_count", "1"))
    kernel = right.dims[of_right.index("i")] * right.dims[of_right.index("o")]
    kind, times = multiplied(x, x.attribute("operand_precision"), x.attribute("algorithm"), platform)
    return Counter({kind: times * 2 * batch * kernel * math.prod(met)})


def multiplied(x: Instruction, precision: str, algorithm: str, platform: str) -> tuple[str, int]:
    """The dtype that the device multiplies, and how many matmuls in this dtype the instruction takes."""
    dtypes = [operand.shape.dtype for operand in x.operands[:2] if isinstance(operand.shape, Array)]
    if not set(dtypes) <= {"f32", "bf16", "f16"} or len(dtypes) != 2 or (algorithm and algorithm not in ALGORITHMS):
        raise Unreadable(
            f"{x.name}: can't count the operations of a product of {' and '.join(dtypes)}"
            f" with the algorithm {algorithm or 'unset'}"
        )
    if algorithm:
        kind, times = ALGORITHMS[algorithm]
        return ("bf16", 6) if (platform, kind) == ("tpu", "f32") else (kind, times)
    if platform == "tpu":  # a float32 operand is a sum of bfloat16 pieces; products of small pieces are omitted
        pieces = 3 if "highest" in precision else 2 if "high" in precision else 1
        return "bf16", (1, pieces, pieces * (pieces + 1) // 2)[dtypes.count("f32")]
    if dtypes[0] == dtypes[1] != "f32":
        return dtypes[0], 1
    return ("f32" if "highest" in precision else "tf32"), 1


class Window(NamedTuple):
    stride: int
    low: int
    high: int
    left_dilation: int
    right_dilation: int


def windows(text: str, n: int) -> list[Window]:
    fields = dict(part.split("=") for part in text.split())

    def of(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * n

    pads = [[int(number) for number in pad.split("_")] for pad in of("pad", "0_0")]
    numbers = zip(of("stride", "1"), pads, of("lhs_dilate", "1"), of("rhs_dilate", "1"), strict=True)
    return [Window(int(stride), *pad, int(left), int(right)) for stride, pad, left, right in numbers]


def meetings(left: int, right: int, window: Window) -> int:
    """How many pairs of a left and a right number are multiplied along a dimension, without padding and holes."""
    width, reach = (left - 1) * window.left_dilation + 1, (right - 1) * window.right_dilation + 1
    results = max(0, (window.low + width + window.high - reach) // window.stride + 1)
    starts, taps = np.arange(results) * window.stride - window.low, np.arange(right) * window.right_dilation
    few, many = sorted((starts, taps), key=len)
    met = (position + many for position in few)
    return sum(int(np.count_nonzero((at >= 0) & (at < width) & (at % window.left_dilation == 0))) for at in met)
