"""The programs whose time and memory are measured, in the shapes of the README's figures. Heads are compared with their
matmuls alone, and losses with optax's. On an accelerator heads run in bfloat16, in chunks of several sizes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bench import memory, peers, speed
from bench.accelerators import HEAD, HEAD_FUNCTIONS, HEADS, TOKENS, TWO_HEADS
from bench.engines import GRADIENT, VALUE
from bench.models import BATCHES, MODELS, Model
from bench.peers import TASKS, Task

LOSSES = ("cross_entropy_with_integer_labels", "cross_entropy_with_logits", "kl_divergence_with_logits")
CHUNKS = (2048, 4096, 8192)
NUMBERS = 2**26  # logits on an accelerator


def beside(label: str, functions: dict[str, Callable], *names: str) -> Task:
    """The task with jce and the first of the named libraries that is available."""
    task = next(task for task in TASKS if task.label == label)
    there = [name for name in names if name in functions and peers.installed(name)][:1]
    return dataclasses.replace(task, functions={name: functions[name] for name in ("jce", *there)})


def head_of(label: str, chunks: tuple[int, ...] = ()) -> Task:
    """The head's task for an accelerator: in bfloat16, with a dense loss to compare with, and at these chunk sizes."""
    task = beside(label, HEAD_FUNCTIONS[label], "optax, bfloat16 logits", "jax, bfloat16 logits")
    chunked = {
        f"jce, chunks of {size}": functools.partial(HEAD_FUNCTIONS[label]["jce"], chunk_size=size) for size in chunks
    }
    return dataclasses.replace(task, functions=task.functions | chunked)


class Timed(NamedTuple):
    """The arguments of `speed.measure`."""

    task: Task
    model: Model
    mode: str
    settings: speed.Settings
    dtype: type = np.float32

    @property
    def label(self) -> str:
        return f"{self.task.label}, {self.model.name}, {self.mode}"


def timed(quick: bool, platform: str) -> list[Timed]:
    return timed_on_cpu(quick) if platform == "cpu" else timed_on_accelerator(quick)


def timed_on_cpu(quick: bool) -> list[Timed]:
    settings = speed.Settings("", (), 2**23, 1e10, 5, 2e-3)
    losses = [Timed(peers_of(label), BATCHES[0], GRADIENT, settings) for label in LOSSES]
    return losses[:1] if quick else [*losses, Timed(peers_of(HEAD), MODELS[2], GRADIENT, settings)]


def peers_of(label: str) -> Task:
    task = next(task for task in TASKS if task.label == label)
    return beside(label, task.functions, "optax")


def timed_on_accelerator(quick: bool) -> list[Timed]:
    """Programs that need more memory come later, so that the device's peak memory is that of each program in turn."""
    settings = speed.Settings("", (), NUMBERS, 0, 10, 2e-3)
    gpt2, llama, larger = (model._replace(rows=TOKENS) for model in HEADS[:3])
    losses = [Timed(peers_of(label), model, GRADIENT, settings) for model in (MODELS[1], MODELS[3]) for label in LOSSES]
    heads = [
        Timed(task, model, mode, settings, jnp.bfloat16)
        for task, model, mode in (
            (head_of(HEAD), gpt2, VALUE),
            (head_of(HEAD), gpt2, GRADIENT),
            (head_of(HEAD, CHUNKS), llama, GRADIENT),
            (head_of("linear_map"), larger, GRADIENT),
            (head_of(TWO_HEADS), larger, GRADIENT),
        )
    ]
    return losses[:1] + heads[1:2] if quick else losses + heads


def temporaries() -> list[dict]:
    """The temporary memory of the README's head, which is compiled here and not run."""
    return memory.at_models(peers_of(HEAD), [MODELS[3]], (GRADIENT,))
