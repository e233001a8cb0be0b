"""Estimates the cost of a compiled program on an accelerator: bytes, operations, and seconds by the roofline.

The kernels of a program are the instructions of its entry computation and of the computations that it calls. A kernel
moves its operands and results, and multiplies matrices. It takes as long as the slower of the two at the device's
peaks. Kernels run one after another.

This is not a measurement. Elementwise operations, and work that is repeated for each tile of a matmul, take no time
here. A copy that would run during a matmul adds its own time. For a program on several devices, the cost is that of one
device: an all-reduce counts as reading and writing its array here, and `hlo.collectives` lists what is sent. An
instruction of unknown cost raises `Unreadable` with its name, because a cost that is silently too small is worse than
none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bench.products import CUBLAS, PLACES, operations
from bench.programs import WIDTHS, Array, Computation, Instruction, Unreadable, entry, leaves


class Device(NamedTuple):
    """A device's peaks, as its maker publishes them."""

    platform: str
    bandwidth: float  # bytes per second
    peaks: dict[str, float]  # operations per second, by the dtype that is multiplied


DEVICES = {
    "h100": Device("cuda", 3.352e12, {"bf16": 989e12, "f16": 989e12, "tf32": 494e12, "f32": 67e12}),
    "v5e": Device("tpu", 0.82e12, {"bf16": 197e12}),
    "v6e": Device("tpu", 1.64e12, {"bf16": 918e12}),
    "tpu7x": Device("tpu", 7.37e12 / 2, {"bf16": 2307e12 / 2}),  # JAX's device is one of the chip's two cores
}


class Kernel(NamedTuple):
    name: str
    times: int
    bytes: float  # this field and the fields below count one run
    operations: dict[str, float]
    seconds: float
    cycles: int  # the compiler's estimate, or 0 if there is none


class Cost(NamedTuple):
    bytes: float
    operations: dict[str, float]  # by the dtype that is multiplied
    seconds: float
    cycles: int
    kernels: int


def cost(text: str, device: Device) -> Cost:
    found, total = kernels(text, device), Counter()
    for kernel in found:
        total.update({kind: kernel.times * n for kind, n in kernel.operations.items()})
    return Cost(
        bytes=sum(k.times * k.bytes for k in found),
        operations=dict(total),
        seconds=seconds(found),
        cycles=sum(k.times * k.cycles for k in found),
        kernels=sum(k.times for k in found),
    )


def kernels(text: str, device: Device) -> list[Kernel]:
    """The program's kernels in the order of their runs. Those in a loop's body appear once, with the number of runs."""
    return list(_launched(entry(text), {}, device))


def seconds(found: Iterable[Kernel]) -> float:
    return sum(k.times * k.seconds for k in found)


# Opcodes: those that cost nothing, those that in a fusion may stand between an array and its slice, and the others.
NOTHING = """add-dependency after-all bitcast constant get-tuple-element opt-barrier parameter partition-id replica-id
tuple copy-done slice-done dynamic-slice-done call-done async-update async-done all-reduce-done"""
UNARY = """abs bitcast-convert cbrt ceil convert copy cosine count-leading-zeros erf exponential exponential-minus-one
floor is-finite log log-plus-one logistic negate not popcnt reduce-precision reshape round-nearest-afz
round-nearest-even rsqrt sign sine sqrt tan tanh transpose"""
OTHERS = """add all-reduce all-reduce-start and atan2 broadcast clamp compare concatenate convolution copy-start
custom-call divide dot dynamic-slice dynamic-slice-start dynamic-update-slice fusion gather iota map maximum minimum
multiply or pad power reduce reduce-window remainder reverse rng-bit-generator scatter select shift-left
shift-right-arithmetic shift-right-logical slice slice-start sort subtract xor"""
FREE, KERNELS = set(NOTHING.split()), set(UNARY.split()) | set(OTHERS.split())
THROUGH = set(UNARY.split()) | {"bitcast"}
UPDATES = {"dynamic-update-slice", "scatter"}
ON_CHIP = {1, 2, 3, 6}  # a TPU's vector memory, flags and scalar memory
MOST_TRIPS = 10**6
NO_ESTIMATE = 2**63 - 1  # written by the compiler for a tpu7x if it has no estimate


def _launched(computation: Computation, known: dict[int, int], device: Device) -> Iterator[Kernel]:
    """The kernels that a computation launches. `known` maps positions in its argument tuple to integers there."""
    for x in computation.instructions.values():
        if x.opcode in ("call", "call-start", "async-start"):
            yield from _launched(next(iter(x.called.values())), {}, device)
        elif x.opcode == "while":
            yield from _looped(x, known, device)
        elif x.opcode == "conditional":  # the most expensive branch
            yield from max((list(_launched(branch, {}, device)) for branch in x.called.values()), key=seconds)
        elif x.opcode in KERNELS:
            if not _is_nothing(x, device):
                yield _kernel(x, device)
        elif x.opcode not in FREE:
            raise Unreadable(f"{x.name}: can't estimate the cost of {x.opcode}")


def _is_nothing(x: Instruction, device: Device) -> bool:
    """Whether an instruction only places an array in memory, or on a TPU only computes scalars, in the scalar unit."""
    if x.opcode == "custom-call" and x.attribute("custom_call_target") in PLACES:
        return True
    arrays = [a for shape in (x.shape, *(y.shape for y in x.operands)) for a in leaves(shape)]
    return device.platform == "tpu" and not any(a.dims for a in arrays)


def _kernel(x: Instruction, device: Device) -> Kernel:
    for part in _fused(x):
        if part.opcode not in FREE | KERNELS:
            raise Unreadable(f"{part.name}, in the fusion {x.name}: can't estimate the cost of {part.opcode}")
    products = operations(x, device.platform)
    if unknown := set(products) - set(device.peaks):
        raise Unreadable(f"{x.name}: products of {', '.join(unknown)} have no peak on this device")
    moved = sum(_read(x, operand, device) for operand in dict.fromkeys(x.operands)) + _written(x, device)
    multiplying = sum(n / device.peaks[kind] for kind, n in products.items())
    cycles = int(x.config.get("window_config", {}).get("estimated_cycles", 0))
    cycles = 0 if cycles == NO_ESTIMATE else cycles
    return Kernel(x.name, 1, moved, dict(products), max(moved / device.bandwidth, multiplying), cycles)


def _fused(x: Instruction) -> Iterator[Instruction]:
    for part in x.called["calls"].instructions.values() if x.opcode == "fusion" else ():
        yield part
        yield from _fused(part)


# Loops


def _looped(x: Instruction, known: dict[int, int], device: Device) -> Iterator[Kernel]:
    body, condition = x.called["body"], x.called["condition"]
    initial = x.operands[0].operands if x.operands[0].opcode == "tuple" else []
    state = _integers(initial, range(len(initial)), known)
    times = int(x.config["known_trip_count"]["n"]) if "known_trip_count" in x.config else _trips(x, state)
    unchanged = {i: n for i, n in state.items() if _passes_on(body, i)}
    for part in (condition, body):
        for kernel in _launched(part, unchanged, device):
            yield kernel._replace(times=times * kernel.times)


def _trips(x: Instruction, state: dict[int, int]) -> int:
    """The number of trips of a loop. A TPU's program does not state it, so this function runs the code that the loop's
    condition depends on.

    A loop that ends after its first trip, whatever its initial state, is a branch for a rare case, so it counts as 0.
    """
    body, condition = x.called["body"], x.called["condition"]
    for times in range(MOST_TRIPS):
        goes_on = _integer(condition.root, state)
        if goes_on == 0:
            return times
        if goes_on is None:
            if _integer(condition.root, _integers(body.results, range(len(body.results)), {})) == 0:
                return 0
            break
        state = _integers(body.results, state, state)
    raise Unreadable(f"{x.name}: a loop of an unknown number of trips")


def _passes_on(body: Computation, i: int) -> bool:
    result = body.results[i]
    return result.opcode == "get-tuple-element" and result.integers("index") == [i]


def _integers(values: list[Instruction], places: Iterable[int], known: dict[int, int]) -> dict[int, int]:
    found = {i: _integer(values[i], known) for i in places}
    return {i: n for i, n in found.items() if n is not None}


def _integer(x: Instruction, known: dict[int, int]) -> int | None:
    """The value of an integer or a bool, if it follows from constants and known parts of the argument."""
    if not isinstance(x.shape, Array) or x.shape.dims or x.shape.dtype[0] not in "sup":
        return None
    if x.opcode == "constant":
        return ["false", "true"].index(x.literal) if x.shape.dtype == "pred" else int(x.literal)
    if x.opcode == "get-tuple-element":
        return known.get(x.integers("index")[0]) if x.operands[0].opcode == "parameter" else None
    if x.opcode == "parameter":
        return known.get(int(x.literal))
    if x.opcode not in ARITHMETIC:
        return None
    values = [_integer(operand, known) for operand in x.operands]
    return None if None in values else ARITHMETIC[x.opcode](x, *values)


COMPARED = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "EQ": int.__eq__, "NE": int.__ne__}
ARITHMETIC = {
    "add": lambda x, a, b: a + b,
    "subtract": lambda x, a, b: a - b,
    "multiply": lambda x, a, b: a * b,
    "maximum": lambda x, a, b: max(a, b),
    "minimum": lambda x, a, b: min(a, b),
    "and": lambda x, a, b: a & b,
    "or": lambda x, a, b: a | b,
    "copy": lambda x, a: a,
    "bitcast": lambda x, a: a,
    "select": lambda x, condition, a, b: a if condition else b,
    "compare": lambda x, a, b: int(COMPARED[x.attribute("direction")](a, b)),
    "fusion": lambda x, *values: _integer(x.called["calls"].root, dict(enumerate(values))),
}


# Bytes


def _in_memory(x: Instruction, array: Array, device: Device) -> bool:
    """Whether the array is in the device's memory. Otherwise it is on the chip, where moving it costs nothing."""
    if array.space and (device.platform != "tpu" or array.space not in ON_CHIP):
        raise Unreadable(f"{x.name}: the memory space {array.space}")
    return not array.space


def _read(x: Instruction, operand: Instruction, device: Device) -> float:
    """Bytes of an operand that a kernel reads from the device's memory."""
    arrays = leaves(operand.shape)
    whole = sum(a.bytes for a in arrays if _in_memory(operand, a, device))
    if not whole or not isinstance(operand.shape, Array):
        return whole
    return min(whole, sum(_touched(x, i, None) for i, y in enumerate(x.operands) if y is operand))


def _touched(x: Instruction, i: int, in_place: frozenset[str] | None) -> float:
    """Bytes read from operand i. Updates named in `in_place` write into their target (if it is None, all do)."""
    operand = x.operands[i].shape
    opcode = x.opcode.removesuffix("-start")
    if opcode == "fusion":
        computation = x.called["calls"]
        return _used(computation.parameters[i], _in_place(computation))
    if not isinstance(operand, Array):
        raise Unreadable(f"{x.name}: a tuple as an operand")
    if i == 0 and opcode in ("slice", "dynamic-slice"):
        return operand._replace(dims=_result(x).dims).bytes
    if i == 0 and opcode == "gather":
        return _result(x).numbers * WIDTHS[operand.dtype]  # the tiles around them are unknown
    if opcode in UPDATES and i < _targets(x) and (in_place is None or x.name in in_place):
        combines = opcode == "scatter" and x.called["to_apply"].root.opcode != "parameter"
        return _changed(x, i) if combines else 0
    return operand.bytes


def _used(x: Instruction, in_place: frozenset[str]) -> float:
    """Bytes that a fusion needs of one of its values: only the slices, if nothing else uses the value."""
    if not isinstance(x.shape, Array):
        raise Unreadable(f"{x.name}: a tuple in a fusion")
    total = x.shape.bytes if x.root else 0.0
    for user, i in x.users:
        if user.opcode in THROUGH and user.users and user.shape.numbers:
            total += _used(user, in_place) * x.shape.bytes / user.shape.bytes
        else:
            total += _touched(user, i, in_place)
    return min(total, x.shape.bytes)


def _result(x: Instruction) -> Array:
    """The shape of an asynchronous slice is (input, result, flags)."""
    return x.shape if isinstance(x.shape, Array) else leaves(x.shape[1])[0]


def _targets(update: Instruction) -> int:
    """How many arrays an update changes. The operands of a scatter are these arrays, indices, and as many updates."""
    return (len(update.operands) - 1) // 2 if update.opcode == "scatter" else 1


def _changed(x: Instruction, i: int = 0) -> float:
    """Bytes that an update changes in target i."""
    target = x.operands[i].shape
    if x.opcode != "scatter":
        return target._replace(dims=x.operands[1].shape.dims).bytes
    return min(target.bytes, x.operands[_targets(x) + 1 + i].shape.numbers * WIDTHS[target.dtype])


def _in_place(computation: Computation) -> frozenset[str]:
    """The updates of a fusion that work in place, so that the rest of the array isn't moved."""
    return frozenset(x.name for result in computation.results for x in _chain(result))


def _chain(result: Instruction) -> list[Instruction]:
    """A chain of updates from a parameter to the result, without other users, last first. Otherwise an empty list."""
    found, x = [], result
    while x.opcode in UPDATES | {"bitcast"} and len(x.users) == (not x.root):
        found += [x] if x.opcode in UPDATES else []
        x = x.operands[0]
    return found if x.opcode == "parameter" else []


def _written(x: Instruction, device: Device) -> float:
    """Bytes of the device's memory that a kernel writes."""
    if x.opcode == "fusion":
        arrays, sizes = leaves(x.shape), _outputs(x.called["calls"])
        if len(arrays) != len(sizes):
            raise Unreadable(f"{x.name}: a tuple among a fusion's results")
        return sum(size for size, a in zip(sizes, arrays, strict=True) if _in_memory(x, a, device))
    if x.opcode in UPDATES:
        arrays = enumerate(leaves(x.shape))
        return sum(_changed(x, i) for i, a in arrays if _in_memory(x, a, device))
    if x.opcode == "copy-start":  # (result, input, flags)
        arrays = leaves(x.shape[0])
    elif x.opcode.endswith("-start") and x.opcode != "all-reduce-start":
        arrays = leaves(x.shape[1])
    elif x.opcode == "custom-call" and x.attribute("custom_call_target") in CUBLAS:
        arrays = leaves(x.shape)[:1]  # the second array is its workspace
    else:
        arrays = leaves(x.shape)
    return sum(a.bytes for a in arrays if _in_memory(x, a, device))


def _outputs(computation: Computation) -> list[float]:
    """Bytes that a fusion writes for each of its results."""
    sizes = []
    for x in computation.results:
        if x.opcode == "fusion":
            sizes += _outputs(x.called["calls"])
        elif chain := _chain(x):
            sizes.append(sum(_changed(update) for update in chain))
        else:
            sizes += [a.bytes for a in leaves(x.shape)]
    return sizes
