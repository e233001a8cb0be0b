"""Tests of the costs of compiled programs, for hand-written modules and for small programs compiled for devices."""

import numpy as np
import pytest

from bench import children, compilers
from bench.products import Window, meetings
from bench.programs import Unreadable, entry
from bench.roofline import DEVICES, cost, kernels
from tests.tools.compiled import PROGRAMS


def module(body: str, before: str = "") -> str:
    """A module with these lines as its entry computation, after the text `before`."""
    return f"HloModule m, is_scheduled=true\n\n{before}\nENTRY %main () -> f32[] {{\n{body.strip(chr(10))}\n}}\n"


def costs(body: str, before: str = "", device: str = "h100"):
    return cost(module(body, before), DEVICES[device])


MB = 2**20
X = "  %x = f32[1024,1024]{1,0} parameter(0)\n"  # 4 MiB
ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}
"""
LAST = (
    ADD.replace("%add", "%last")
    .replace("add(%a, %b)", "copy(%b)")
    .replace("ROOT %s", "%s")
    .replace("%b = f32[] parameter", "ROOT %b = f32[] parameter")
)


def fused(body: str, kind: str = "kLoop", name: str = "%f") -> str:
    return f"{name} (p: f32[]) -> f32[] {{\n{body.strip(chr(10))}\n}}\n"


def test_a_kernel_moves_its_operands_and_results():
    found = costs(X + "  ROOT %y = bf16[1024,1024]{1,0} convert(%x)")
    assert (found.bytes, found.operations, found.kernels) == (6 * MB, {}, 1)
    assert found.seconds == 6 * MB / 3.352e12


def test_a_fusion_moves_its_parameters_and_each_of_its_results():
    inner = fused("""
  %p = f32[1024,1024]{1,0} parameter(0)
  %q = f32[1024]{0} parameter(1)
  %e = f32[1024,1024]{1,0} exponential(%p)
  %b = f32[1024,1024]{1,0} broadcast(%q), dimensions={0}
  %m = f32[1024,1024]{1,0} multiply(%e, %b)
  ROOT %t = (f32[1024,1024]{1,0}, f32[1024,1024]{1,0}) tuple(%e, %m)""")
    body = (
        X
        + """  %q = f32[1024]{0} parameter(1)
  %two = (f32[1024,1024]{1,0}, /*index=1*/f32[1024,1024]{1,0}) fusion(%x, %q), calls=%f, metadata={op_name="a{"}
  ROOT %y = f32[1024,1024]{1,0} get-tuple-element(%two), index=1"""
    )
    assert costs(body, inner).bytes == 12 * MB + 4096


def test_the_same_operand_twice_is_read_once():
    assert costs(X + "  ROOT %y = f32[1024,1024]{1,0} multiply(%x, %x)").bytes == 8 * MB


def test_free_instructions():
    body = (
        X
        + """
  %c = f32[] constant(1)
  %b = f32[1048576]{0} bitcast(%x)
  %t = (f32[1048576]{0}, f32[]) tuple(%b, %c)
  %r = f32[1024]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %g = f32[1048576]{0} get-tuple-element(%t), index=0"""
    )
    assert costs(body)[:3] == (0, {}, 0)


# Slices and gathers


@pytest.mark.parametrize(
    ("opcode", "rows"),
    [
        ("slice(%p), slice={[8:16], [0:1024]}", 8),
        ("dynamic-slice(%p, %i, %i), dynamic_slice_sizes={8,1024}", 8),
        ("gather(%p, %j), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, slice_sizes={1,1024}", 8),
        ("gather(%j, %p), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, slice_sizes={1,1024}", 1024),
    ],
)
@pytest.mark.parametrize("through", [False, True])
def test_slices_read_only_their_entries(opcode, rows, through):
    """The slice is alone, in a fusion, or in a fusion after an elementwise operation."""
    parameters = """  %p = f32[1024,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %j = s32[8]{0} parameter(2)
"""
    slice_ = f"  ROOT %y = f32[8,1024]{{1,0}} {opcode}"
    small = (4 if "%i" in opcode else 0) + (32 if "%j" in opcode else 0)
    expected = 4096 * rows + small + 4096 * 8
    if not through:
        assert costs(parameters + slice_).bytes == expected
    call = "  ROOT %z = f32[8,1024]{1,0} fusion(%p, %i, %j), kind=kLoop, calls=%f"
    inner = (
        parameters
        + "  %a = f32[1024,1024]{1,0} negate(%p)\n" * through
        + slice_.replace("%p", "%a" if through else "%p")
    )
    assert costs(parameters + call, fused(inner)).bytes == expected


def test_an_array_that_is_also_used_whole_is_read_whole():
    inner = fused("""
  %p = f32[1024,1024]{1,0} parameter(0)
  %s = f32[8,1024]{1,0} slice(%p), slice={[8:16], [0:1024]}
  %n = f32[1024,1024]{1,0} negate(%p)
  ROOT %t = (f32[8,1024]{1,0}, f32[1024,1024]{1,0}) tuple(%s, %n)""")
    body = X + "  ROOT %y = (f32[8,1024]{1,0}, f32[1024,1024]{1,0}) fusion(%x), kind=kLoop, calls=%f"
    assert costs(body, inner).bytes == 8 * MB + 8 * 4096


# Updates in place

UPDATE = """
  %p = f32[1024,1024]{1,0} parameter(0)
  %u = f32[8,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
"""
INTO = "f32[1024,1024]{1,0} dynamic-update-slice"


def test_an_update_in_place_moves_only_the_update():
    assert costs(UPDATE + f"  ROOT %y = {INTO}(%p, %u, %i, %i)").bytes == 2 * 8 * 4096 + 4


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (f"  ROOT %y = {INTO}(%p, %u, %i, %i)", 2 * 8 * 4096),
        (f"  %a = {INTO}(%p, %u, %i, %i)\n  ROOT %y = {INTO}(%a, %u, %i, %i)", 3 * 8 * 4096),
        (f"  %a = {INTO}(%p, %u, %i, %i)\n  ROOT %y = f32[1024,1024]{{1,0}} negate(%a)", 8 * MB + 8 * 4096),
        (f"  %a = f32[1024,1024]{{1,0}} negate(%p)\n  ROOT %y = {INTO}(%a, %u, %i, %i)", 8 * MB + 8 * 4096),
        (
            "  %s = f32[8,1024]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={8,1024}\n"
            f"  %v = f32[8,1024]{{1,0}} add(%s, %u)\n  ROOT %y = {INTO}(%p, %v, %i, %i)",
            3 * 8 * 4096,
        ),
    ],
    ids=["root", "two", "inside", "of another", "sum"],
)
def test_an_update_in_a_fusion(inner, expected):
    """An update is in place if it is the root and its target a parameter. Otherwise the whole array is moved."""
    body = UPDATE + "  ROOT %z = f32[1024,1024]{1,0} fusion(%p, %u, %i), kind=kLoop, calls=%f"
    assert costs(body, fused(UPDATE + inner)).bytes == expected + 4


def test_an_update_that_a_fusion_reads_is_not_in_place():
    two = "(f32[1024,1024]{1,0}, f32[1024,1024]{1,0})"
    inner = f"  %a = {INTO}(%p, %u, %i, %i)\n  %n = f32[1024,1024]{{1,0}} negate(%a)\n  ROOT %t = {two} tuple(%a, %n)"
    body = UPDATE + f"  ROOT %z = {two} fusion(%p, %u, %i), kind=kLoop, calls=%f"
    assert costs(body, fused(UPDATE + inner)).bytes == 12 * MB + 8 * 4096 + 4


@pytest.mark.parametrize(("combiner", "times"), [("%add", 3), ("%last", 2)])
def test_a_scatter_that_adds_reads_its_target(combiner, times):
    arguments = """
  %p = f32[1024,1024]{1,0} parameter(0)
  %j = s32[8,2]{1,0} parameter(1)
  %u = f32[8]{0} parameter(2)
"""
    scatter = "f32[1024,1024]{1,0} scatter(%p, %j, %u), update_window_dims={}, inserted_window_dims={0,1}"
    inner = arguments + f"  ROOT %y = {scatter}, to_apply={combiner}"
    before = ADD + LAST
    assert costs(inner, before).bytes == times * 32 + 64
    call = arguments + "  ROOT %z = f32[1024,1024]{1,0} fusion(%p, %j, %u), kind=kInput, calls=%f"
    assert costs(call, before + fused(inner)).bytes == times * 32 + 64


# Loops and branches

BODY = """
%body (t: (s32[], f32[1024,1024], s32[])) -> (s32[], f32[1024,1024], s32[]) {
  %t = (s32[], f32[1024,1024]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = f32[1024,1024]{1,0} get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=2
  %step = s32[] constant(2)
  %j = s32[] add(%i, %step)
  %b = f32[1024,1024]{1,0} negate(%a)
  ROOT %r = (s32[], f32[1024,1024]{1,0}, s32[]) tuple(%j, %b, %n)
}
%condition (t: (s32[], f32[1024,1024], s32[])) -> pred[] {
  %t = (s32[], f32[1024,1024]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] BOUND
  ROOT %c = pred[] compare(%i, %n), direction=LT
}
"""
LOOP = """  %start = s32[] constant(3)
  %end = s32[] constant(10)
  %t = (s32[], f32[1024,1024]{1,0}, s32[]) tuple(%start, %x, %end)
  ROOT %w = (s32[], f32[1024,1024]{1,0}, s32[]) while(%t), condition=%condition, body=%body"""
KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize(
    ("bound", "loop", "times"),
    [
        ("parameter(1)", LOOP + KNOWN, 5),
        ("constant(10)", LOOP, 4),  # 3, 5, 7, 9
        ("get-tuple-element(%t), index=2", LOOP, 4),
    ],
    ids=["said", "a constant", "passed on"],
)
def test_a_loop_costs_its_body_times_its_trips(bound, loop, times):
    found = costs(X + loop, BODY.replace("BOUND", bound), "v5e")
    assert (found.bytes, found.kernels) == (times * 8 * MB, times)


def test_a_loops_condition_is_a_kernel_in_each_trip():
    """On an H100, the addition to the loop's counter is a kernel too."""
    assert costs(X + LOOP + KNOWN, BODY.replace("BOUND", "constant(10)")).kernels == 5 * 3


@pytest.mark.parametrize(("end", "kernels"), [("%n", 4 * 5), ("%i", None)])
def test_a_loop_in_a_loop(end, kernels):
    """The inner loop's end is a constant from outside, or the outer loop's counter, which changes in each trip."""
    inner = BODY.replace("BOUND", "get-tuple-element(%t), index=2")
    outer = inner.replace("%body", "%outer_body").replace("%condition", "%outer_condition")
    outer = outer.replace(
        "  %b = f32[1024,1024]{1,0} negate(%a)",
        "  %z = s32[] constant(0)\n  %u = (s32[], f32[1024,1024]{1,0}, s32[]) tuple(%z, %a, END)\n"
        "  %v = (s32[], f32[1024,1024]{1,0}, s32[]) while(%u), condition=%condition, body=%body\n"
        "  %b = f32[1024,1024]{1,0} get-tuple-element(%v), index=1",
    )
    loop = LOOP.replace("%condition", "%outer_condition").replace("%body", "%outer_body")
    if kernels is None:
        with pytest.raises(Unreadable, match="v: a loop of an unknown number of trips"):
            costs(X + loop, inner + outer.replace("END", end), "v5e")
    else:
        assert costs(X + loop, inner + outer.replace("END", end), "v5e").kernels == kernels


@pytest.mark.parametrize("end", ["s32[] parameter(1)", "s32[] custom-call(%start)"])
def test_a_loop_with_an_unknown_number_of_trips_raises(end):
    before = BODY.replace("BOUND", "get-tuple-element(%t), index=2")
    with pytest.raises(Unreadable, match="w: a loop of an unknown number of trips"):
        costs(X + LOOP.replace("s32[] constant(10)", end), before, "v5e")


BRANCHES = """
%cheap (a: f32[1024,1024]) -> f32[1024,1024] {
  ROOT %a = f32[1024,1024]{1,0} parameter(0)
}
%dear (a: f32[1024,1024]) -> f32[1024,1024] {
  %a = f32[1024,1024]{1,0} parameter(0)
  %b = f32[1024,1024]{1,0} negate(%a)
  ROOT %c = f32[1024,1024]{1,0} exponential(%b)
}
%middle (a: f32[1024,1024]) -> f32[1024,1024] {
  %a = f32[1024,1024]{1,0} parameter(0)
  ROOT %b = f32[1024,1024]{1,0} negate(%a)
}
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("branch_computations={%cheap, %dear, %middle}", 16),
        ("true_computation=%middle, false_computation=%cheap", 8),
    ],
)
def test_a_conditional_costs_as_much_as_its_most_expensive_branch(names, expected):
    body = X + f"  %i = s32[] parameter(1)\n  ROOT %y = f32[1024,1024]{{1,0}} conditional(%i, %x, %x, %x), {names}"
    assert costs(body, BRANCHES).bytes == expected * MB


def test_a_call_costs_as_much_as_its_computation():
    y = "  ROOT %y = f32[1024,1024]{1,0} call(%x), to_apply=%dear"
    assert costs(X + y, BRANCHES).bytes == 16 * MB


def test_asynchronous_work_is_counted_at_its_start():
    asynchronous = """
  %s = ((f32[1024,1024]{1,0}), f32[1024,1024]{1,0}, u32[]) async-start(%x), calls=%middle
  %y = f32[1024,1024]{1,0} async-done(%s)
  %k = ((f32[1024,1024]{1,0}), f32[1024,1024]{1,0}, u32[]{:S(8)}) call-start(%x), to_apply=%middle
  %l = f32[1024,1024]{1,0} call-done(%k)
  %t = ((f32[1024,1024]{1,0}), f32[8,1024]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:1024]}
  %z = f32[8,1024]{1,0:S(1)} slice-done(%t)
  %c = (f32[1024,1024]{1,0:S(1)}, f32[1024,1024]{1,0}, u32[]{:S(2)}) copy-start(%x)
  ROOT %d = f32[1024,1024]{1,0:S(1)} copy-done(%c)"""
    assert costs(X + asynchronous, BRANCHES, "v5e").bytes == 2 * 8 * MB + 8 * 4096 + 4 * MB


def test_an_all_reduce_reads_and_writes_its_array():
    body = """
  %s = f32[1024,1024]{1,0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add
  %d = f32[1024,1024]{1,0} all-reduce-done(%s)
  ROOT %y = f32[1024,1024]{1,0} all-reduce(%d), replica_groups={{0,1}}, to_apply=%add"""
    assert costs(X + body, ADD).bytes == 2 * 8 * MB


# Matmuls

FACTORS = """  %a = {}[256,512]{{1,0}} parameter(0)
  %b = {}[512,128]{{1,0}} parameter(1)
"""
DOT = "  ROOT %c = f32[256,128]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
PRODUCT = 2 * 256 * 512 * 128


@pytest.mark.parametrize(
    ("types", "attributes", "h100", "tpu"),
    [
        (("bf16", "bf16"), "", ("bf16", 1), 1),
        (("f16", "f16"), "", ("f16", 1), 1),
        (("bf16", "bf16"), ", operand_precision={highest,highest}", ("bf16", 1), 1),
        (("f32", "f32"), "", ("tf32", 1), 1),
        (("f32", "f32"), ", operand_precision={high,high}", ("tf32", 1), 3),
        (("f32", "f32"), ", operand_precision={highest,highest}", ("f32", 1), 6),
        (("f32", "bf16"), "", ("tf32", 1), 1),
        (("bf16", "f32"), ", operand_precision={high,high}", ("tf32", 1), 2),
        (("f32", "bf16"), ", operand_precision={highest,highest}", ("f32", 1), 3),
        (("f32", "f32"), ", algorithm=dot_bf16_bf16_f32", ("bf16", 1), 1),
        (("f32", "f32"), ", algorithm=dot_bf16_bf16_f32_x3", ("bf16", 3), 3),
        (("f32", "f32"), ", algorithm=dot_f32_f32_f32", ("f32", 1), 6),
    ],
)
def test_matmuls_by_type_precision_and_algorithm(types, attributes, h100, tpu):
    body = FACTORS.format(*types) + DOT + attributes
    kind, times = h100
    assert costs(body).operations == {kind: times * PRODUCT}
    assert costs(body, device="v5e").operations == {"bf16": tpu * PRODUCT}
    call = FACTORS.format(*types) + "  ROOT %c = f32[256,128]{1,0} fusion(%a, %b), kind=kCustom, calls=%f"
    assert costs(call, fused(body)).operations == {kind: times * PRODUCT}


def test_a_matmul_takes_the_time_of_operations_or_bytes():
    """For 1024³ multiplications, operations take longer than bytes in float32, but not in bfloat16."""
    of = "  %a = {0}[1024,1024]{{1,0}} parameter(0)\n  %b = {0}[1024,1024]{{1,0}} parameter(1)\n"
    dot = DOT.replace("256,128", "1024,1024")
    assert costs(of.format("bf16") + dot).seconds == 8 * MB / 3.352e12
    assert costs(of.format("f32") + dot + ", operand_precision={highest,highest}").seconds == 2 * 1024**3 / 67e12


def test_a_batched_matmul():
    body = """  %a = bf16[16,256,512]{2,1,0} parameter(0)
  %b = bf16[16,512,128]{2,1,0} parameter(1)
  ROOT %c = f32[16,256,128]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}"""
    assert costs(body).operations == {"bf16": 16 * PRODUCT}


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
@pytest.mark.parametrize(
    ("precision", "kind", "times"),
    [
        ('{"operand_precision":["DEFAULT","DEFAULT"],"algorithm":"ALG_UNSET"}', "tf32", 1),
        ('{"operand_precision":["HIGHEST","HIGHEST"],"algorithm":"ALG_UNSET"}', "f32", 1),
        ('{"operand_precision":["DEFAULT","DEFAULT"],"algorithm":"ALG_DOT_BF16_BF16_F32_X3"}', "bf16", 3),
    ],
)
def test_a_call_of_cublas(target, precision, kind, times):
    """The second result is a workspace, whose bytes aren't counted."""
    dimensions = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
    config = f'{{"gemm_backend_config":{{{dimensions},"precision_config":{precision}}}}}'
    call = f'custom-call(%a, %b), custom_call_target="{target}", backend_config={config}'
    found = costs(FACTORS.format("f32", "f32") + f"  ROOT %c = (f32[256,128]{{1,0}}, s8[4194304]{{0}}) {call}")
    assert found.operations == {kind: times * PRODUCT}
    assert found.bytes == 4 * (256 * 512 + 512 * 128 + 256 * 128)


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "expected"),
    [
        ("256,512", "512,128", "256,128", "dim_labels=bf_io->bf", PRODUCT),
        ("512,256", "512,128", "256,128", "dim_labels=fb_io->bf", PRODUCT),
        ("256,512", "128,512", "128,256", "dim_labels=bf_oi->fb", PRODUCT),
        (  # the batch is a window dimension, and each batch is multiplied once
            "16,256,512",
            "16,512,128",
            "16,256,128",
            "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0bf_0io->0bf",
            16 * PRODUCT,
        ),
        (
            "16,256,512",
            "16,512,128",
            "16,256,128",
            "window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            16 * 16 * PRODUCT,
        ),
        ("256,8192", "512,2048", "256,2048", "dim_labels=bf_io->bf, feature_group_count=16", 16 * PRODUCT),
        ("4096,512", "512,2048", "256,2048", "dim_labels=bf_io->bf, batch_group_count=16", 16 * PRODUCT),
    ],
)
def test_matmuls_on_a_tpu_are_convolutions(left, right, result, attributes, expected):
    body = f"""  %a = bf16[{left}] parameter(0)
  %b = bf16[{right}] parameter(1)
  ROOT %c = f32[{result}] convolution(%a, %b), {attributes}"""
    assert costs(body, device="v5e").operations == {"bf16": expected}


def test_meetings(rng):
    """The count agrees with a sum over a dilated and padded array of ones."""
    for _ in range(200):
        left, right = rng.integers(1, 7, 2)
        stride, of_left, of_right = rng.integers(1, 4, 3)
        low, high = rng.integers(0, 6, 2)
        line = np.zeros((left - 1) * of_left + 1, int)
        line[::of_left] = 1
        line = np.pad(line, (low, high))
        starts = range(0, len(line) - (right - 1) * of_right, stride)
        expected = sum(line[start : start + (right - 1) * of_right + 1 : of_right].sum() for start in starts)
        assert meetings(left, right, Window(stride, low, high, of_left, of_right)) == expected


# A TPU's memory


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[1024,1024]{1,0:T(8,128)}", 4 * MB),
        ("f32[1024,1]{1,0:T(8,128)}", 128 * 4096),
        ("f32[1024,1]{0,1:T(8,128)}", 8 * 4096),
        ("f32[1024,1]{0,1:T(1,128)}", 4096),
        ("f32[1024,10]{1,0:T(8,128)}", 128 * 4096),
        ("bf16[1000,130]{1,0:T(8,128)(2,1)}", 2 * 1000 * 256),
        ("bf16[9,128]{1,0:T(8,128)(2,1)}", 2 * 16 * 128),
        ("f32[1000]{0:T(1024)}", 4096),
        ("pred[16]{0:T(512)(128)(4,1)}", 512),
        ("f32[3,9,128]{2,1,0:T(8,128)}", 4 * 3 * 16 * 128),
        ("f32[3,9,128]{2,0,1:T(8,128)}", 4 * 9 * 8 * 128),
        ("f32[1024,1024]{1,0:T(8,128)S(1)}", 0),
    ],
)
def test_padding_and_memory_space(shape, expected):
    body = f"  %x = {shape} parameter(0)\n  ROOT %y = f32[1024]{{0:T(1024)S(1)}} reduce(%x, %x), to_apply=%add"
    assert costs(body, ADD, "v5e").bytes == expected


def test_the_memory_spaces_of_a_fusions_operands():
    """Memory spaces inside of the fusion don't count. A nested fusion is part of the outer one."""
    inner = fused("  ROOT %p = f32[1024,1024]{1,0:T(8,128)S(1)} parameter(0)", name="%g") + fused("""
  %q = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %n = f32[1024,1024]{1,0:T(8,128)} fusion(%q), kind=kLoop, calls=%g
  ROOT %s = f32[8,1024]{1,0:T(8,128)} slice(%n), slice={[0:8], [0:1024]}""")
    body = """  %x = f32[1024,1024]{1,0:T(8,128)SPACE} parameter(0)
  ROOT %y = f32[8,1024]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%f"""
    assert costs(body.replace("SPACE", "S(1)"), inner, "v5e").bytes == 8 * 4096
    assert costs(body.replace("SPACE", ""), inner, "v5e").bytes == 4 * MB + 8 * 4096


def test_scalars_on_a_tpu_are_not_kernels():
    body = "  %x = s32[]{:T(128)} parameter(0)\n  ROOT %y = s32[]{:T(128)} add(%x, %x)"
    assert costs(body, device="v5e").kernels == 0
    assert costs(body).kernels == 1


@pytest.mark.parametrize(("estimate", "expected"), [(100, 400), (2**63 - 1, 0)])
def test_cycles_are_the_compilers_estimate(estimate, expected):
    config = f', backend_config={{"window_config":{{"estimated_cycles":"{estimate}"}}}}'
    before = BODY.replace("BOUND", "constant(10)").replace("negate(%a)", f"negate(%a){config}")
    assert costs(X + LOOP, before, "v5e").cycles == expected


# Unreadable programs


@pytest.mark.parametrize(
    ("instruction", "told"),
    [
        ("f32[1024,1024]{1,0} all-to-all(%x), dimensions={0}", "y: can't estimate the cost of all-to-all"),
        ("f32[1024,1024]{1,0} fusion(%x), kind=kLoop, calls=%f", "z, in the fusion y: can't estimate the cost of fft"),
        ("f32[1024,1024]{1,0} fusion(%x), kind=kLoop, calls=%g", "z, in the fusion y: can't estimate the cost of fft"),
        (
            'f32[8]{0} custom-call(%x), custom_call_target="mine"',
            "y: can't count the operations of the custom call mine",
        ),
        (
            "f32[8]{0} dot(%x, %x), lhs_contracting_dims={0}, algorithm=dot_new",
            "y: can't count the operations of a product of f32 and f32 with the algorithm dot_new",
        ),
        ("c64[8]{0} negate(%x)", r"y: the shape c64\[8\]"),
        ("f32[8]{0:T(*,128)} negate(%x)", "y: the layout of"),
        ("f32[8]{0:S(5)} negate(%x)", "y: the memory space 5"),
        ("f32[8]{0} negate(%nothing)", "y: nothing isn't defined before it"),
    ],
)
def test_unknown_instructions_raise(instruction, told):
    inner = "  %p = f32[1024,1024]{1,0} parameter(0)\n  ROOT %z = f32[1024,1024]{1,0} "
    before = ADD + fused(inner + "fft(%p)") + fused(inner.replace("%z", "%w") + "fusion(%p), calls=%f", name="%g")
    for device in DEVICES:
        with pytest.raises(Unreadable, match=told):
            costs(X + f"  ROOT %y = {instruction}", before, device)


def test_matmuls_without_a_peak_raise():
    with pytest.raises(Unreadable, match="c: products of f16 have no peak"):
        cost(module(FACTORS.format("f16", "f16") + DOT), DEVICES["h100"]._replace(peaks={"bf16": 1.0}))


def test_a_text_without_an_entry_raises():
    with pytest.raises(Unreadable, match="no entry"):
        entry("HloModule m\n")


def test_kernels_are_named():
    assert [k.name for k in kernels(module(X + "  ROOT %y = f32[1024,1024]{1,0} negate(%x)"), DEVICES["h100"])] == ["y"]


# Real programs


@pytest.mark.needs_jit
@pytest.mark.skipif(bool(compilers.missing()), reason=f"not installed: {', '.join(compilers.missing())}")
@pytest.mark.parametrize("device", ["h100", "v5e"])
def test_costs_of_compiled_programs(device):
    found = {
        name: cost(text, DEVICES[device])
        for name, (text,) in children.lines("tests.tools.compiled", device, compilers.environment(), quiet=True)
    }
    assert set(found) == set(PROGRAMS)
    for name, program in PROGRAMS.items():
        assert found[name].operations == program.operations[device], name
        if program.bytes[device] is not None:
            assert found[name].bytes == pytest.approx(program.bytes[device], rel=1e-3), name
