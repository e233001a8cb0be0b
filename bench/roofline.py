"""What a compiled program would cost on an accelerator: bytes, operations, and seconds by the roofline.

Its kernels are the instructions of its entry computation and of what that calls. A kernel moves its operands and its
results, and multiplies matrices; it lasts as long as the slower of the two at the device's peaks, and after it comes
the next. That is no measurement: what is elementwise, or done again for each tile of a product, takes no time here,
and a copy that runs beside a product takes its own. Of a program for several devices it is what each of them does: a
sum over devices takes the reading and writing of it here, and `hlo.collectives` lists what is sent. What can't be read
raises `Unreadable`, which names the instruction: a cost that is silently too small is worse than none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bench.products import CUBLAS, PLACES, operations
from bench.programs import WIDTHS, Array, Computation, Instruction, Unreadable, entry, leaves


class Device(NamedTuple):
    """The peaks that its maker publishes."""

    platform: str
    bandwidth: float  # bytes a second
    peaks: dict[str, float]  # operations a second, by what is multiplied


DEVICES = {
    "h100": Device("cuda", 3.352e12, {"bf16": 989e12, "f16": 989e12, "tf32": 494e12, "f32": 67e12}),
    "v5e": Device("tpu", 0.82e12, {"bf16": 197e12}),
    "v6e": Device("tpu", 1.64e12, {"bf16": 918e12}),
    "tpu7x": Device("tpu", 7.37e12 / 2, {"bf16": 2307e12 / 2}),  # JAX's device is one of the chip's two cores
}


class Kernel(NamedTuple):
    name: str
    times: int
    bytes: float  # of one time, like the rest
    operations: dict[str, float]
    seconds: float
    cycles: int  # the compiler's estimate, 0 where it makes none


class Cost(NamedTuple):
    bytes: float
    operations: dict[str, float]  # by what is multiplied
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
    """In the order in which they run; those of a loop's body once, with how many times."""
    return list(_launched(entry(text), {}, device))


def seconds(found: Iterable[Kernel]) -> float:
    return sum(k.times * k.seconds for k in found)


# Opcodes: of what costs nothing, of what may stand between an array and a slice of it in a fusion, and of the rest.
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
ON_CHIP = {1, 2, 3, 6}  # of a TPU: vector memory, flags, scalar memory
MOST_TRIPS = 10**6
NO_ESTIMATE = 2**63 - 1  # what stands for one where a tpu7x's compiler makes none


def _launched(computation: Computation, known: dict[int, int], device: Device) -> Iterator[Kernel]:
    """What it launches; `known` are integers in the tuple that it is given, by their place."""
    for x in computation.instructions.values():
        if x.opcode in ("call", "call-start", "async-start"):
            yield from _launched(next(iter(x.called.values())), {}, device)
        elif x.opcode == "while":
            yield from _looped(x, known, device)
        elif x.opcode == "conditional":  # the dearest of its branches
            yield from max((list(_launched(branch, {}, device)) for branch in x.called.values()), key=seconds)
        elif x.opcode in KERNELS:
            if not _is_nothing(x, device):
                yield _kernel(x, device)
        elif x.opcode not in FREE:
            raise Unreadable(f"{x.name}: nothing is known of the cost of {x.opcode}")


def _is_nothing(x: Instruction, device: Device) -> bool:
    """A place in memory, or on a TPU a few scalars, which its scalar unit computes."""
    if x.opcode == "custom-call" and x.attribute("custom_call_target") in PLACES:
        return True
    arrays = [a for shape in (x.shape, *(y.shape for y in x.operands)) for a in leaves(shape)]
    return device.platform == "tpu" and not any(a.dims for a in arrays)


def _kernel(x: Instruction, device: Device) -> Kernel:
    for part in _fused(x):
        if part.opcode not in FREE | KERNELS:
            raise Unreadable(f"{part.name}, in the fusion {x.name}: nothing is known of {part.opcode}")
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
    """How often a loop runs, by running what its condition depends on: a TPU's program doesn't say it otherwise.

    One that ends after its first trip, whatever it began with, asks for something rare by a flag: it is taken for none.
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
    """The value of an integer or a bool, where it follows from constants and what is known of the argument."""
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
    """Or else on the chip, where moving it costs nothing."""
    if array.space and (device.platform != "tpu" or array.space not in ON_CHIP):
        raise Unreadable(f"{x.name}: the memory space {array.space}")
    return not array.space


def _read(x: Instruction, operand: Instruction, device: Device) -> float:
    """Bytes of the device's memory that a kernel reads of an operand."""
    arrays = leaves(operand.shape)
    whole = sum(a.bytes for a in arrays if _in_memory(operand, a, device))
    if not whole or not isinstance(operand.shape, Array):
        return whole
    return min(whole, sum(_touched(x, i, None) for i, y in enumerate(x.operands) if y is operand))


def _touched(x: Instruction, i: int, in_place: frozenset[str] | None) -> float:
    """Bytes that it takes of its operand number i; the updates named write to their target (None: all do)."""
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
        return _result(x).numbers * WIDTHS[operand.dtype]  # of the tiles around them nothing is known
    if opcode in UPDATES and i < _targets(x) and (in_place is None or x.name in in_place):
        combines = opcode == "scatter" and x.called["to_apply"].root.opcode != "parameter"
        return _changed(x, i) if combines else 0
    return operand.bytes


def _used(x: Instruction, in_place: frozenset[str]) -> float:
    """Bytes that a fusion needs of one of its values: of what only slices look at, the slices."""
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
    """An asynchronous slice's shape is (what it takes, what it makes, flags)."""
    return x.shape if isinstance(x.shape, Array) else leaves(x.shape[1])[0]


def _targets(update: Instruction) -> int:
    """How many arrays it changes: a scatter's operands are those, indices, and as many updates."""
    return (len(update.operands) - 1) // 2 if update.opcode == "scatter" else 1


def _changed(x: Instruction, i: int = 0) -> float:
    """Bytes of what an update changes in its target number i."""
    target = x.operands[i].shape
    if x.opcode != "scatter":
        return target._replace(dims=x.operands[1].shape.dims).bytes
    return min(target.bytes, x.operands[_targets(x) + 1 + i].shape.numbers * WIDTHS[target.dtype])


def _in_place(computation: Computation) -> frozenset[str]:
    """The updates of a fusion whose result takes its argument's place, so that the rest of it isn't moved."""
    return frozenset(x.name for result in computation.results for x in _chain(result))


def _chain(result: Instruction) -> list[Instruction]:
    """Updates of updates of a parameter, with no other user: from the last to the first; none if it is otherwise."""
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
    if x.opcode == "copy-start":  # (what it makes, what it takes, flags)
        arrays = leaves(x.shape[0])
    elif x.opcode.endswith("-start") and x.opcode != "all-reduce-start":
        arrays = leaves(x.shape[1])
    elif x.opcode == "custom-call" and x.attribute("custom_call_target") in CUBLAS:
        arrays = leaves(x.shape)[:1]  # and then its workspace
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
