"""Heads in train steps of Flax and Equinox: bfloat16, tied embeddings, micro-batches, checkpointed layers."""

import copy
import importlib
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jce

EXTRA = "needs the extra 'frameworks'"
eqx = pytest.importorskip("equinox", reason=EXTRA)
nnx = pytest.importorskip("flax.nnx", reason=EXTRA)

pytestmark = pytest.mark.needs_jit  # trains models, and reads compiled programs

CLASSES, WIDTH, LAYERS, CHUNK = 1024, 32, 2, 32
MICRO_BATCHES, SEQUENCES, LENGTH = 3, 4, 64
STEPS = 20


# Losses, summed over the tokens that have a label


def fused(labels, hidden, head):
    return jce.linear_cross_entropy(labels, hidden, head, where=labels >= 0, reduction="sum", chunk_size=CHUNK)


def mapped(labels, hidden, head):
    options = {"where": labels >= 0, "reduction": "sum", "chunk_size": CHUNK}
    return jce.linear_map(jce.cross_entropy_with_integer_labels, labels, jce.Linear(hidden, head), **options)


def dense(labels, hidden, head):
    """The loss from float32 logits of all tokens at once."""
    log_q = jax.nn.log_softmax(hidden.astype(np.float32) @ head.astype(np.float32).T)
    at_label = jnp.take_along_axis(log_q, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.where(labels >= 0, at_label, 0).sum()


def mean_and_gradient(loss, parameters, words, labels):
    """The mean loss over all tokens and its gradient. Micro-batches run one at a time, and are summed in float32."""

    def add(sums, batch):
        parts = jax.value_and_grad(loss)(parameters, *batch)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, parts), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, np.float32), (jnp.zeros(()), parameters))
    sums, _ = jax.lax.scan(add, zeros, (words, labels))
    return jax.tree.map(lambda x: x / (labels >= 0).sum().astype(x.dtype), sums)


# Both models have embeddings, layers with a residual, and the embedding table as head. `split` returns a model's
# parameters, and the loss as a function of them. `train` returns the compiled step, the losses and the trained model.


class FlaxModel(nnx.Module):
    def __init__(self):
        options = {"rngs": nnx.Rngs(0), "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.embedding = nnx.Embed(CLASSES, WIDTH, **options)
        self.layers = nnx.List(nnx.Linear(WIDTH, WIDTH, **options) for _ in range(LAYERS))

    def loss(self, of_head, words, labels):
        hidden = self.embedding(words)
        for layer in self.layers:
            hidden = nnx.remat(lambda layer, h: h + jnp.tanh(layer(h)))(layer, hidden)
        return of_head(labels, hidden, self.embedding.embedding[...])


class Flax:
    model = FlaxModel

    @staticmethod
    def split(model, of_head):
        graph, parameters = nnx.split(model)
        return parameters, lambda parameters, *batch: nnx.merge(graph, parameters).loss(of_head, *batch)

    @classmethod
    def train(cls, of_head, *data):
        model = cls.model()
        optimizer = nnx.Optimizer(model, optax.adam(0.01, mu_dtype=np.float32), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, *data):
            parameters, loss = cls.split(model, of_head)
            value, gradient = mean_and_gradient(loss, parameters, *data)
            with jax.numpy_dtype_promotion("standard"):  # for optax
                optimizer.update(model, gradient)
            return value

        program = step.lower(model, optimizer, *data).compile()
        return program.compiled, [float(program(model, optimizer, *data)) for _ in range(STEPS)], model


class EquinoxModel(eqx.Module):
    embedding: eqx.nn.Embedding
    layers: list

    def __init__(self):
        first, *others = jax.random.split(jax.random.key(0), 1 + LAYERS)
        self.embedding = eqx.nn.Embedding(
            weight=jax.random.normal(first, (CLASSES, WIDTH), jnp.bfloat16) / math.sqrt(WIDTH)
        )
        self.layers = [eqx.nn.Linear(WIDTH, WIDTH, dtype=jnp.bfloat16, key=key) for key in others]

    def loss(self, of_head, words, labels):
        hidden = self.embedding.weight[words]
        for layer in self.layers:
            of_tokens = jax.vmap(jax.vmap(layer))
            hidden = eqx.filter_checkpoint(lambda of_tokens, h: h + jnp.tanh(of_tokens(h)))(of_tokens, hidden)
        return of_head(labels, hidden, self.embedding.weight)


class Equinox:
    model = EquinoxModel

    @staticmethod
    def split(model, of_head):
        parameters, rest = eqx.partition(model, eqx.is_inexact_array)
        return parameters, lambda parameters, *batch: eqx.combine(parameters, rest).loss(of_head, *batch)

    @classmethod
    def train(cls, of_head, *data):
        model, optimizer = cls.model(), optax.adam(0.01, mu_dtype=np.float32)
        state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

        @eqx.filter_jit
        def step(model, state, *data):
            parameters, loss = cls.split(model, of_head)
            value, gradient = mean_and_gradient(loss, parameters, *data)
            with jax.numpy_dtype_promotion("standard"):  # for optax
                updates, state = optimizer.update(gradient, state)
                model = eqx.combine(optax.apply_updates(parameters, updates), model)
            return value, model, state

        program, losses = step.lower(model, state, *data).compile(), []
        for _ in range(STEPS):
            value, model, state = program(model, state, *data)
            losses.append(float(value))
        return program.compiled, losses, model


each_framework = pytest.mark.parametrize(("framework", "ours"), [(Flax, fused), (Equinox, mapped)])


@pytest.fixture
def data(rng):
    """Words and labels, [micro-batch, sequence, position]. The end of each sequence, or all of it, has no labels."""
    words = rng.integers(0, CLASSES, (MICRO_BATCHES, SEQUENCES, LENGTH), np.int32)
    lengths = rng.integers(0, LENGTH, (MICRO_BATCHES, SEQUENCES, 1))
    return words, np.where(np.arange(LENGTH) < lengths, (3 * words + 1) % CLASSES, -100).astype(np.int32)


def largest(program):
    """The number of entries of a compiled program's largest array."""
    shapes = re.findall(r"\[(\d+(?:,\d+)+)\]", program.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


LOGITS = SEQUENCES * LENGTH * CLASSES  # in a micro-batch


@each_framework
def test_the_gradient_equals_the_dense_gradient(framework, ours, data):
    """Gradients agree in norm to 4u, with u = 2⁻⁸.

    Hidden states and gradients are rounded to bfloat16, by at most u each time. If float32 numbers differ by an ulp,
    they may be rounded to different neighbors. XLA also omits some roundings, and not the same ones in both programs.
    The value, a mean over some hundred tokens, hardly changes.
    """
    model, results, sizes = framework.model(), [], []
    for of_head in (ours, dense):
        parameters, loss = framework.split(model, of_head)
        program = jax.jit(lambda p, loss=loss: mean_and_gradient(loss, p, *data)).lower(parameters).compile()
        results.append(program(parameters))
        sizes.append(largest(program))
    (value, gradient), (dense_value, dense_gradient) = results
    np.testing.assert_allclose(value, dense_value, rtol=2**-12)
    for g, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(dense_gradient), strict=True):
        assert np.linalg.norm(g - expected) <= 2**-6 * np.linalg.norm(expected)
    assert sizes[0] < LOGITS / 4 < LOGITS <= sizes[1]


@each_framework
def test_training(framework, ours, data):
    """No array in the step is as large as tokens × classes. The loss falls, and parameters stay bfloat16."""
    program, losses, model = framework.train(ours, *data)
    assert largest(program) < LOGITS / 4
    assert losses[-1] < losses[0] / 2
    assert {x.dtype for x in jax.tree.leaves(framework.split(model, ours)[0])} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_readmes_train_step(optax_promotes):
    """The README's code runs unchanged. Its loss equals optax's loss of dense logits."""
    text = (pathlib.Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import flax.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)
    hidden, head = names["Model"]().apply(names["params"], names["words"])
    labels, x = names["labels"], hidden @ head.T
    kept = (labels >= 0).astype(x.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(x, jnp.maximum(labels, 0))
    losses += 1e-4 * jnp.square(jax.nn.logsumexp(x, -1))
    expected = (losses * kept).sum() / kept.sum()
    np.testing.assert_allclose(names["loss"](names["params"], names["words"], labels), expected, rtol=1e-5)
    assert float(names["value"]) > float(expected)  # the loss before the step


@pytest.mark.slow
def test_options_that_are_flax_parameters(rng):
    """The head, the temperature and the soft cap may be parameters of a Flax module."""
    shapes = (8, WIDTH), (CLASSES, WIDTH)
    hidden, head = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    labels = np.arange(8)

    def loss(head, temperature, cap):
        return jce.linear_cross_entropy(labels, hidden, head, temperature=temperature, logit_soft_cap=cap)

    def of_parameters(*arrays):
        return loss(*map(nnx.Param, arrays))

    arguments = head, jnp.float32(0.7), jnp.float32(5)
    got, expected = (jax.grad(f, (0, 1, 2))(*arguments) for f in (of_parameters, loss))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_heads_that_are_modules(rng):
    """Modules may be heads: Flax's Linear, one whose low-rank update alone is trained, an embedding's `attend`, and
    Equinox's Linear, which takes one state."""
    h = jnp.asarray(rng.standard_normal((3, 5, 8)), np.float32)
    y = jnp.asarray(rng.integers(0, 12, (3, 5)), np.int32)

    def ours(head):
        return jce.linear_cross_entropy(y, h, head, chunk_size=4)

    def theirs(head):
        return jce.cross_entropy_with_integer_labels(y, head(h)).mean()

    def close(gradient, model, **options):
        with jax.numpy_rank_promotion("allow"):
            got, expected = (nnx.jit(nnx.grad(lambda m, f=f: f(gradient(m)), **options))(model) for f in (ours, theirs))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert jax.tree.leaves(got)

    close(lambda m: m, nnx.Linear(8, 12, rngs=nnx.Rngs(0)))
    close(lambda m: m, nnx.LoRALinear(8, 12, lora_rank=2, rngs=nnx.Rngs(0)), argnums=nnx.DiffState(0, nnx.LoRAParam))
    close(lambda m: m.attend, nnx.Embed(12, 8, rngs=nnx.Rngs(0)))
    module = eqx.nn.Linear(8, 12, key=jax.random.key(0))
    got, expected = (eqx.filter_grad(lambda m, f=f: f(jax.vmap(jax.vmap(m))))(module) for f in (ours, theirs))
    np.testing.assert_allclose(got.weight, expected.weight, rtol=1e-5, atol=1e-6)


# Two files of notebooks/examples/. In both, `step` trains only the low-rank matrices a and b of a model.


def in_float32(parameters, rng):
    """The parameters in float32, plus noise: b is initially 0, and a would have no gradient."""
    return jax.tree.map(lambda x: jnp.float32(x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)), parameters)


def nnx_step(example, batch, rng):
    """Trained parameters before a gradient step, a model as a function of them, the program, the loss, and after it."""
    graph, *parts = nnx.split(example.Model(nnx.Rngs(0)), nnx.LoRAParam, ...)
    trained, frozen = parts = in_float32(parts, rng)
    model = nnx.merge(graph, *jax.tree.map(jnp.copy, parts))  # the step donates the model
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.LoRAParam)
    program = example.step.lower(model, optimizer, *batch).compile()
    loss = program(model, optimizer, *batch)
    return trained, lambda t: nnx.merge(graph, t, frozen), program.compiled, loss, nnx.state(model, nnx.LoRAParam)


def equinox_step(example, batch, rng):
    trained, frozen = in_float32(example.split(example.Model(jax.random.key(0))), rng)
    arguments = (frozen, *batch), jax.tree.map(jnp.copy, trained), example.optimizer.init(trained)
    program = example.step.lower(*arguments).compile()
    after, _, loss = program(*arguments)
    return trained, lambda t: eqx.combine(t, frozen), program.compiled, loss, after


@pytest.mark.parametrize(("name", "one_step"), [("train_nnx", nnx_step), ("train_equinox", equinox_step)])
def test_the_examples(name, one_step, rng, capsys, monkeypatch, optax_promotes):
    """The loss of the program falls. A float32 step has the loss and gradient of dense logits. It writes the trained
    parameters over the old ones, and makes no array as large as tokens × classes or with the shape of the head."""
    example = importlib.import_module(f"notebooks.examples.{name}")
    example.main(steps=12)
    losses = [float(x) for x in re.findall(r": (\S+) nats", capsys.readouterr().out)]
    assert losses[-1] < losses[0] / 2

    monkeypatch.setattr(example, "optimizer", optax.sgd(1.0), raising=False)
    words, labels = batch = example.batch(0)
    trained, model_of, program, loss, after = one_step(example, batch, rng)

    def dense(trained):
        model = model_of(trained)
        log_q = jax.nn.log_softmax(model.head(model(words)))
        at_label = jnp.take_along_axis(log_q, np.maximum(labels, 0)[..., None], -1)[..., 0]
        return -at_label.mean(where=labels >= 0)

    of_all = jax.jit(jax.value_and_grad(dense)).lower(trained).compile()
    expected_loss, gradient = of_all(trained)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    for x, y, g in zip(*map(jax.tree.leaves, (trained, after, gradient)), strict=True):
        np.testing.assert_allclose(x - y, g, rtol=1e-3, atol=1e-3 * float(jnp.abs(g).max()))

    assert program.memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(trained))
    assert largest(program) < words[0].size * example.CLASSES < words.size * example.CLASSES <= largest(of_all)
    shapes = "|".join(f"{a},{b}" for a, b in [(example.CLASSES, example.WIDTH), (example.WIDTH, example.CLASSES)])
    made = re.findall(rf"= f32\[(?:{shapes})\]\S* ([a-z-]+)\(", program.as_text())
    assert {*made} <= {"parameter", "get-tuple-element", "bitcast"}


# Existing models: each recipe of "A model that you did not write" in jce/README.md, with its code unchanged


def recipe(name, **names):
    text = (pathlib.Path(__file__).parents[2] / "jce" / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"\n### A model that you did not write\n(.*?)\n##", text, re.DOTALL)
    names |= {"copy": copy, "eqx": eqx, "jax": jax, "jce": jce, "nnx": nnx}
    exec("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)), names)
    return names[name]


class FlaxLM(nnx.Module):
    """The head has a low-rank update, or is the embedding table. One layer has dropout, and one is checkpointed."""

    def __init__(self, tied=False, casts=False, soft_cap=None):
        rngs = nnx.Rngs(0, dropout=1)
        self.embedder, self.layer = Embedder(rngs), nnx.Linear(8, 8, rngs=rngs)
        self.dropout, self.casts, self.soft_cap = nnx.Dropout(0.2, rngs=rngs), casts, soft_cap
        self.tied = tied
        if not tied:
            self.lm_head = nnx.LoRALinear(8, 12, lora_rank=2, rngs=rngs)

    def __call__(self, tokens):
        h = nnx.remat(lambda layer, h: jnp.tanh(layer(h)))(self.layer, self.embedder(tokens))
        h = self.dropout(h)
        x = self.embedder.decode(h) if self.tied else self.lm_head(h)
        if self.soft_cap is not None:
            x = jnp.tanh(x / self.soft_cap) * self.soft_cap
        return jnp.astype(x, np.float32) if self.casts else x.astype(np.float32)


class Embedder(nnx.Embed):
    def __init__(self, rngs):
        super().__init__(12, 8, rngs=rngs)

    def decode(self, h):
        return self.attend(h)


class EquinoxLM(eqx.Module):
    """The head takes the state of one token, or the states of all tokens."""

    embedding: eqx.nn.Embedding
    lm_head: eqx.Module
    maps: bool

    def __init__(self, maps=True):
        keys = jax.random.split(jax.random.key(0))
        self.embedding, self.maps = eqx.nn.Embedding(12, 8, key=keys[0]), maps
        self.lm_head = eqx.nn.Linear(8, 12, key=keys[1])
        if not maps:
            self.lm_head = EquinoxHead(self.lm_head.weight)

    def __call__(self, tokens):
        return (jax.vmap(self.lm_head) if self.maps else self.lm_head)(jnp.tanh(jax.vmap(self.embedding)(tokens)))


class EquinoxHead(eqx.Module):
    weight: jax.Array

    def __call__(self, h):
        return h @ self.weight.T


def dense_loss(labels, x):
    return jce.cross_entropy_with_integer_labels(labels, x).mean()


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, 12, (3, 6)), np.int32)


@pytest.fixture
def labels(rng):
    return jnp.asarray(rng.integers(0, 12, (3, 6)), np.int32)


def all_close(got, expected):
    assert jax.tree.leaves(got)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def by_split(loss):
    """Value and gradient, with JAX's transformations instead of nnx's."""

    def found(model):
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)
        program = jax.jit(jax.value_and_grad(lambda *parts: loss(nnx.merge(graph, *parts, copy=True))))
        return program(parameters, rest)

    return found


TRANSFORMS = {
    "jit and remat": lambda loss: nnx.jit(nnx.value_and_grad(nnx.remat(loss))),
    "jit": lambda loss: nnx.jit(nnx.value_and_grad(loss)),
    "split": by_split,
    "eager": nnx.value_and_grad,
}
each_transform = pytest.mark.parametrize(
    "transform", [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(TRANSFORMS)]
)


@each_transform
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nnx_loss", {}),
        ("tied_loss", {"tied": True}),
        ("qwix_loss", {}),
        ("casting_loss", {"casts": True}),
        ("capped_loss", {"soft_cap": 2.0}),
    ],
)
def test_a_head_replaced_in_flax(name, kind, transform, tokens, labels):
    """The value, the gradient and the random-number counters are those of the dense loss. The model keeps its head."""
    loss, models = recipe(name), [FlaxLM(**kind) for _ in range(2)]
    graph, own = nnx.graphdef(models[0]), {k: x for k, x in vars(models[0]).items() if isinstance(x, nnx.Module)}
    with jax.numpy_rank_promotion("allow"):
        got = TRANSFORMS[transform](lambda model: loss(model, tokens, labels))(models[0])
        expected = TRANSFORMS[transform](lambda model: dense_loss(labels, model(tokens)))(models[1])
        all_close(got, expected)
        assert nnx.graphdef(models[0]) == graph
        assert all(getattr(models[0], k) is x for k, x in own.items())
        all_close(*(jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngKey))) for model in models))
        assert isinstance(models[0](tokens), jax.Array)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("nnx_loss", {"soft_cap": 2.0}, r"unsupported operand type\(s\) for /: 'Linear' and 'float'"),
        ("nnx_loss", {"casts": True}, r"Linear: it stands for logits .* cast to another dtype"),
        (
            "nnx_loss",
            {"tied": True},
            r"linear_cross_entropy: head must be .* the head that it calls has not been replaced",
        ),
    ],
)
def test_the_wrong_recipe_in_flax(name, kind, text, tokens, labels):
    with pytest.raises(TypeError, match=text):
        recipe(name)(FlaxLM(**kind), tokens, labels)


def test_a_head_replaced_in_equinox(tokens, labels):
    """One sequence, a vmap of the loss or of the model, and a head that takes the states of all tokens."""
    loss = recipe("equinox_loss")

    def of_each(model):
        return jax.vmap(lambda *sequence: loss(model, *sequence))(tokens, labels).mean()

    def of_all(model):
        changed = eqx.tree_at(lambda model: model.lm_head, model, lambda h: h)
        return jce.linear_cross_entropy(labels, jax.vmap(changed)(tokens), jax.vmap(jax.vmap(model.lm_head)))

    def by_linear(model):
        changed = eqx.tree_at(lambda model: model.lm_head, model, lambda h: jce.Linear(h, model.lm_head))
        return jce.linear_cross_entropy(labels[0], changed(tokens[0]))

    def found(loss, model):
        return eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)

    def dense(model):
        return dense_loss(labels, jax.vmap(model)(tokens))

    def dense_of_one(model):
        return dense_loss(labels[0], model(tokens[0]))

    model = EquinoxLM()
    all_close(found(lambda model: loss(model, tokens[0], labels[0]), model), found(dense_of_one, model))
    all_close(found(of_each, model), found(dense, model))
    all_close(found(of_all, model), found(dense, model))
    assert model.lm_head(jnp.ones(8)).shape == (12,)
    with pytest.raises(ValueError, match=r"must not return a Linear whose head is a function.*pass jax\.vmap\(head\)"):
        by_linear(model)
    model = EquinoxLM(maps=False)
    all_close(found(by_linear, model), found(dense_of_one, model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_replaced_in_linen(tied, tokens, labels):
    nn = pytest.importorskip("flax.linen", reason=EXTRA)
    loss = recipe("linen_loss", flax=importlib.import_module("flax"))
    head = {"path": ("embedder",), "method": "attend"} if tied else {}

    class Model(nn.Module):
        def setup(self):
            self.embedder, self.lm_head = nn.Embed(12, 8), nn.Dense(12)

        def __call__(self, tokens):
            h = jnp.tanh(self.embedder(tokens))
            return self.embedder.attend(h) if tied else self.lm_head(h)

    model = Model()
    params = model.init(jax.random.key(0), tokens)
    with jax.numpy_rank_promotion("allow"):
        dense = jax.value_and_grad(lambda params: dense_loss(labels, model.apply(params, tokens)))(params)
        all_close(jax.jit(jax.value_and_grad(lambda p: loss(model, p, tokens, labels, **head)))(params), dense)


def quantized(qwix, model, h):
    """Models quantized for training (int8, float8, weights alone), and low-rank updates of int8 and plain weights."""
    for weights, act in (("int8", "int8"), ("float8_e4m3fn", "float8_e4m3fn"), ("int8", None)):
        rule = qwix.QtRule(module_path=".*", weight_qtype=weights, act_qtype=act)
        yield qwix.quantize_model(model, qwix.QtProvider([rule]), h), nnx.Param
    for weights in ("int8", None):
        lora = qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0, **({"weight_qtype": weights} if weights else {}))
        yield qwix.apply_lora_to_model(model, lora, h, rngs=nnx.Rngs(1)), nnx.LoRAParam


@pytest.mark.filterwarnings("ignore")  # Qwix's warnings
def test_models_that_qwix_changes(rng):
    """The loss is exact if the head is traced in the model's call, by the recipe or by a call of jce in the model. The
    recipe clones the head, because Qwix writes to it. Outside of the model's call, Qwix doesn't change the head, so its
    low-rank update has no gradient. Inside, a head that is a matrix is refused."""
    loss = recipe("qwix_loss")
    qwix = pytest.importorskip("qwix", reason=EXTRA)
    y = jnp.asarray(rng.integers(0, 12, (2, 6)), np.int32)
    h = jnp.asarray(rng.standard_normal((2, 6, 8)), np.float32)

    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.lm_head = nnx.Einsum("bsd,dn->bsn", (8, 12), rngs=nnx.Rngs(1))

        def __call__(self, h, of_head=lambda head, h: head(h)):
            return of_head(self.lm_head, nnx.gelu(self.layer(h)))

    def dense(model):
        return jce.cross_entropy_with_integer_labels(y, model(h)).mean()

    def replaced(model):
        return loss(model, h, y)

    def inside(model):
        return model(h, lambda head, h: jce.linear_cross_entropy(y, h, head, chunk_size=4))

    def outside(model):
        return jce.linear_cross_entropy(y, nnx.gelu(model.layer(h)), model.lm_head, chunk_size=4)

    def of_matrix(model):
        return model(h, lambda head, h: jce.linear_cross_entropy(y, h, head.kernel[...].T))

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for model, trained in quantized(qwix, Model(), h):
            graph, parameters, rest = nnx.split(model, trained, ...)
            parameters = jax.tree.map(lambda x: x + 0.1, parameters)

            def found(*losses, graph=graph, parameters=parameters, rest=rest):
                def of(loss):
                    return jax.value_and_grad(lambda parameters: loss(nnx.merge(graph, parameters, rest)))(parameters)

                return jax.jit(lambda: [of(loss) for loss in losses])()

            expected, *got = found(dense, replaced, *([inside] if trained is nnx.Param else []))
            for one in got:
                all_close(one, expected)
        gradient = jax.tree.leaves(found(outside)[0][1]["lm_head"])
        assert gradient
        assert not any(map(jnp.any, gradient))
        with pytest.raises(ValueError, match=r"while Qwix replaces.*head must be a function"):
            of_matrix(model)
