"""The formulas in docstrings, parsed and evaluated, equal the table's oracle: value and derivatives."""

import inspect
import math
import re

import mpmath as mp
import pytest

from tests.kernels import BETA, SMOOTHING, TAIL, Z_LOSS, each_function, easy, kl_divergence, sigmoid, softmax
from tests.oracle import entries, partial, to_mp

LETTERS = {"alpha": "α", "beta": "β", "logits": "x", "alpha_logits": "x", "beta_logits": "y"}
TOKEN = re.compile(
    r"\s+|\d+|Σ[ᵢⱼpq]|KL\(\w‖\w\)|(?:p_logits|q_logits|log|KL|[a-zα-ωHL])(?:_y|[ᵢⱼ])?|\[i = y\]|\[no label is i\]|."
)
WORDS = {"Σp": "sum(p)", "Σq": "q[y]", "q_y": "q[y]", "[i = y]": "(i == y)", "[no label is i]": "(i != y)"}
NAME = re.compile(r"(\d+|p_logits|q_logits|KL|[a-zα-ωHL])([ᵢⱼ]?)")
# Rows of the table that aren't the docstring's main formula: where the docstring has their value and derivatives
OF_NUMBERS = r"the loss is\s+(.*?)\.\s"
VALUES = {"smoothed": OF_NUMBERS, "z-loss": OF_NUMBERS, TAIL: r"one more entry\s+is (.*?), for all"}
NUMBERS = [("ε", "smoothed", SMOOTHING), ("ζ", "z-loss", Z_LOSS)]
DERIVATIVES = {TAIL: r"for the tail it\s+is (.*?)\."}


class Formula:
    """A docstring's formula as a Python expression. Juxtaposition multiplies, and log takes the quotient after it.

    Factors without a space between them, as in α(1-β), bind tighter than a quotient. Factors with a space bind looser.
    Σᵢ and Σⱼ sum the term after them, and ² squares a letter, a number or a parenthesis.
    """

    def __init__(self, text: str):
        self.tokens = [t for t in TOKEN.findall(re.sub(r" ([-+]) ", r"\1", text.strip())) if t]
        try:
            self.python = self.sum()
            assert not self.tokens
        except (AssertionError, IndexError):
            rest = "".join(self.tokens) or "its end"
            raise AssertionError(
                f"can't read {text!r} at {rest!r}: a formula has letters with ᵢ or ⱼ, numbers, + - / ( ) ², a space or"
                f" nothing for a product, Σᵢ, Σⱼ and log with a space before and after them, KL(p‖q), and {[*WORDS]}"
            ) from None

    def next_is(self, *tokens: str) -> bool:
        return bool(self.tokens) and self.tokens[0] in tokens

    def sum(self) -> str:
        terms = self.tokens.pop(0) if self.next_is("-") else ""
        terms += self.term()
        while self.next_is("+", "-"):
            terms += self.tokens.pop(0) + self.term()
        return terms

    def term(self) -> str:
        factors = [self.factor()]
        while self.next_is(" "):
            self.tokens.pop(0)
            factors.append(self.factor())
        return " * ".join(factors)

    def factor(self) -> str:
        if self.next_is("log"):
            del self.tokens[:2]
            return f"log({self.quotient()})"
        return self.quotient()

    def quotient(self) -> str:
        product = self.product()
        while self.next_is("/"):
            self.tokens.pop(0)
            product += f" / {self.product()}"
        return product

    def product(self) -> str:
        atoms = [self.atom()]
        while self.tokens and not self.next_is(" ", "/", "+", "-", ")"):
            atoms.append(self.atom())
        return f"({' * '.join(atoms)})"

    def atom(self) -> str:
        atom = self.unsquared()
        if self.next_is("²"):
            self.tokens.pop(0)
            atom += "**2"
        return atom

    def unsquared(self) -> str:
        token = self.tokens[0]
        name = NAME.fullmatch(token)
        assert name or token in WORDS or token in ("(", "σ", "Σᵢ", "Σⱼ") or token.startswith("KL(")
        self.tokens.pop(0)
        if token in ("Σᵢ", "Σⱼ"):
            assert self.tokens.pop(0) == " "
            return f"sum({self.term()} for {'i' if token == 'Σᵢ' else 'j'} in range(n))"
        if token in ("(", "σ"):
            if token == "σ":
                self.tokens.pop(0)
            inside = self.sum()
            assert self.tokens.pop(0) == ")"
            return f"{'sigmoid' if token == 'σ' else ''}({inside})"
        if token.startswith("KL("):
            return f"KL({token[3]}, {token[5]})"
        return WORDS.get(token) or name[1] + {"ᵢ": "[i]", "ⱼ": "[j]", "": ""}[name[2]]


def values(kernel, row) -> dict:
    """The values of a docstring's letters: arguments, and letters that it defines by a softmax or a sigmoid of them."""
    named = dict(zip(kernel.arguments, row, strict=True))
    letters = {LETTERS.get(name, name): x for name, x in named.items()}
    for letter, link, argument in re.findall(r"(\w) = (softmax|σ)\((\w+)\)", formula_of(kernel)):
        letters[letter] = (softmax if link == "softmax" else sigmoid)(named[argument])
    if "m = βp + (1-β)q" in formula_of(kernel):
        letters["β"] = mp.mpf(BETA)
        letters["m"] = [BETA * a + (1 - BETA) * b for a, b in zip(letters["p"], letters["q"], strict=True)]
    letters |= {name[-1]: mp.exp(x) for name, x in named.items() if name.startswith("log_")}
    numbers = {
        "ε": mp.mpf(SMOOTHING if kernel.note == "smoothed" else 0),
        "ζ": Z_LOSS if kernel.note == "z-loss" else 0,
    }
    if "L = log Σ exp logits" in inspect.getdoc(kernel.function):
        letters["L"] = mp.log(sum(map(mp.exp, row[-1])))
    n = len(row[0]) if kernel.has_classes else 1
    return {"log": mp.log, "sigmoid": sigmoid, "KL": kl_divergence, "n": n, "y": 0} | numbers | letters


def formula_of(kernel) -> str:
    """The docstring's second paragraph."""
    return " ".join(inspect.getdoc(kernel.function).split("\n\n")[1].split())


def definition(kernel) -> tuple[str | None, str]:
    """The name and the formula: for "H(p, q) = Σᵢ … with …" the name is H, and for "log 1/q_y with …" there is none."""
    line = re.fullmatch(r"(?:(\w+)\([^)]*\) = )?(.*?)(?: with .*)?", formula_of(kernel))
    assert line
    name, text = line.groups()
    return name, Formula(text).python


def close(a, b) -> bool:
    return abs(a - b) <= 1e-30 * (1 + abs(b))


@pytest.mark.parametrize("text", ["p₃", "Σₖ pₖ", "2log p", "p^2", "(p", "pᵢ * qᵢ", "log", "√p"])
def test_text_that_is_not_a_formula_raises_an_error(text):
    with pytest.raises(AssertionError, match=r"can't read .*: a formula has letters"):
        Formula(text)


def test_parsing_of_formulas():
    row = {"p": [2.0, 3.0], "q": [4.0, 5.0], "n": 2, "i": 1, "log": math.log}
    formulas = {"-2pᵢ/Σⱼ pⱼ²": -6 / 13, "1/2 Σᵢ pᵢ(1 + qᵢ)² - n": 77, "log 1/qᵢ - 1": -math.log(5) - 1}
    for text, expected in formulas.items():
        assert eval(Formula(text).python, row) == pytest.approx(expected)


@each_function
def test_value(kernel, rng):
    row = to_mp([x[0] if kernel.has_classes else x[0, 0] for x in easy(kernel, rng, (1, 5))])
    _, formula = definition(kernel)
    with mp.workprec(450):
        if kernel.note in VALUES:
            (formula,) = re.findall(VALUES[kernel.note], inspect.getdoc(kernel.function))
            formula = Formula(formula).python
        assert close(eval(formula, values(kernel, row)), kernel.formula(*row)), formula


@each_function
def test_derivatives(kernel, rng):
    row = to_mp([x[0] if kernel.has_classes else x[0, 0] for x in easy(kernel, rng, (1, 5))])
    text = re.search(r"Derivative:\n(.*?)\n\n", inspect.getdoc(kernel.function), re.DOTALL).group(1)
    found = re.findall(r"[∂d]\w*/[∂d](\S+) = (.+?)(?:, (?=[∂d]|each|in |with)|;)", " ".join(text.split()))
    assert len(found) == len(kernel.arguments), (
        f"{text.strip()!r} must have ∂/∂xᵢ = a formula for each of {kernel.arguments}, with a comma between them, and"
        f' at the end ", in p\'s dtype"; found {found}'
    )
    if kernel.note in DERIVATIVES:
        found = [(found[0][0], *re.findall(DERIVATIVES[kernel.note], text))]
    name, _ = definition(kernel)
    with mp.workprec(450):
        letters = values(kernel, row)
        letters |= {name: kernel.formula(*row)} if name else {}
        symbols = [LETTERS.get(argument, argument) for argument in kernel.arguments]
        for symbol, expression in found:
            argument = symbols.index(symbol.removesuffix("ᵢ"))
            for a, i, x in entries(row):
                if a == argument:
                    got = eval(Formula(expression).python, {**letters, "i": i})
                    assert close(got, partial(kernel.formula, row, (a, i, x))), expression
