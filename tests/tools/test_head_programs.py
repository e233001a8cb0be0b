"""The README's claims about heads on accelerators, from programs compiled for them. Needs the extra `accelerators`.

No figure depends on the machine.
"""

import functools
import re

import pytest

from bench import children, compilers
from bench.hlo import collectives
from bench.roofline import DEVICES, cost
from tests.tools import compiled_heads
from tests.tools.compiled_heads import CLASSES, LOCAL, LOSSES, TOKENS, WIDTH

pytestmark = [
    pytest.mark.needs_jit,
    pytest.mark.skipif(bool(compilers.missing()), reason=f"not installed: {', '.join(compilers.missing())}"),
]
CHUNK = 2048  # tokens
each_device = pytest.mark.parametrize("device", ["h100", "v5e"])


@functools.cache
def compiled(device: str) -> dict[str, tuple[str, int]]:
    return dict(children.lines(compiled_heads.__name__, device, compilers.environment(), quiet=True))


LONG = [pytest.mark.slow, pytest.mark.long]  # compiling takes long


@pytest.mark.parametrize(
    ("device", "name", "products", "chunks"),
    [
        ("h100", "alone", 2.07, 2.2),
        ("h100", "penalized", 2.07, 2.2),
        ("v5e", "alone", 1.06, 2.2),
        ("v5e", "penalized", 1.06, 2.2),
        pytest.param("v6e", "alone", 1.15, 2.2, marks=LONG),
        pytest.param("tpu7x", "alone", 1.06, 4.2, marks=LONG),
    ],
)
def test_value_and_gradient(device, name, products, chunks):
    """The roofline relative to that of three bare bfloat16 matmuls, and memory relative to a chunk's float32 logits."""
    text, temporaries = compiled(device)[name]
    found = cost(text, DEVICES[device])
    bare = 3 * 2 * TOKENS * WIDTH * CLASSES
    assert found.operations == {"bf16": pytest.approx(bare, rel=0.01)}
    assert 1 < found.seconds / (bare / DEVICES[device].peaks["bf16"]) < products
    assert temporaries < chunks * 4 * CHUNK * CLASSES


@pytest.mark.parametrize(("device", "products", "chunks"), [("h100", 1.82, 1.1), ("v5e", 1.1, 0.1)])
def test_value(device, products, chunks):
    """The roofline relative to that of a bare matmul, and memory relative to a chunk's float32 logits."""
    text, temporaries = compiled(device)["value"]
    bare = 2 * TOKENS * WIDTH * CLASSES / DEVICES[device].peaks["bf16"]
    assert 1 < cost(text, DEVICES[device]).seconds / bare < products
    assert temporaries < chunks * 4 * CHUNK * CLASSES


@pytest.mark.parametrize(("device", "products"), [("h100", 2.9), ("v5e", 1.8)])
def test_log_probabilities_and_entropies_share_passes(device, products):
    """The roofline on one of eight devices, relative to that of four bare matmuls. Separate sums would take longer."""
    bare = 4 * 2 * TOKENS * WIDTH * CLASSES / DEVICES[device].peaks["bf16"]
    assert 1 < cost(compiled(device)["log-probabilities"][0], DEVICES[device]).seconds / bare < products


@each_device
@pytest.mark.parametrize("loss", LOSSES)
def test_an_auto_mesh_sums_the_heads_gradient_once(device, loss):
    sent = collectives(compiled(device)[loss][0])
    assert {x.kind for x in sent} == {"all-reduce"}
    assert not any(x.in_loop for x in sent)
    first = [1, WIDTH] if len(sent) > 2 and loss == "log-probabilities" else []  # one token's label and state
    assert sorted(x.size for x in sent) == [1, *first, CLASSES * WIDTH]


@pytest.mark.parametrize(("device", "more"), [("h100", 0), ("v5e", 1)])
def test_a_loop_over_unmasked_tokens(device, more):
    """The loop needs the memory of a loop over all tokens, and on a TPU one more gradient of the head, which it doesn't
    copy. On a mesh, no step of the loop sends anything."""
    text, temporaries = compiled(device)["of some alone"]
    assert temporaries < 1.05 * (compiled(device)["alone"][1] + more * 4 * CLASSES * WIDTH)
    assert not re.search(rf"f32\[{CLASSES},{WIDTH}\]\S* copy(-start)?\(", text)
    sent = collectives(compiled(device)["of some"][0])
    assert {x.kind for x in sent} == {"all-reduce"}
    assert not any(x.in_loop for x in sent)
    assert max(x.size for x in sent) == CLASSES * WIDTH
    assert sum(x.size == CLASSES * WIDTH for x in sent) == 1


@each_device
def test_the_cost_of_a_head_split_by_classes(device):
    """Splitting adds only all-reduces: of a few numbers per token, and after the loop of each gradient."""
    split, alone = (cost(compiled(device)[name][0], DEVICES[device]) for name in ("sharded", "a part alone"))
    assert split.operations == pytest.approx(alone.operations, rel=0.01)
    assert split.seconds < 1.1 * alone.seconds
    (tokens, width), (classes, _) = LOCAL[1:]
    sent = collectives(compiled(device)["sharded"][0])
    assert {x.kind for x in sent} == {"all-reduce"}
    assert sorted(x.size for x in sent if x.size > 8 * tokens) == sorted([tokens * width, classes * width])
    assert sum(x.size for x in sent if x.size <= 8 * tokens) <= 4 * tokens + 2
