# %% [markdown]
# # Trainers of other libraries: jce in tunix, with the same losses and less than a third of the memory
#
# [tunix](https://github.com/google/tunix) (0.1.7) fine-tunes language models on text (SFT), on preferences (DPO) and
# for reward (GRPO). It trains all weights, or low-rank updates, which Qwix adds. Its losses take the logits of all
# tokens. This notebook runs its trainers on its own Qwen3, in a toy size: first unmodified, then with jce in place of
# their loss or their log-probabilities. Each replacement takes 4 to 10 lines. The model isn't modified either. In a
# shallow copy of it, jce's loss replaces the head, so the copy returns the loss instead of logits. This notebook needs
# the extra `trainers`.

# %%
# ruff: noqa: E402 (what tunix imports may warn when it is imported)
import copy
import logging
import time
import types
import warnings

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import algo_core, common
from tunix.sft import peft_trainer, utils
from tunix.sft.dpo import dpo_trainer

import jce

plt.rcParams.update({"font.size": 12, "figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
BLUE, GREY = "#0072B2", "0.6"
n, d, SEQUENCES, PROMPT, COMPLETION, STEPS = 16_384, 64, 8, 64, 192, 3
rng = np.random.default_rng(0)


def qwen(tied=False, lora=False):
    """Two layers, in float32."""
    sizes = {"num_layers": 2, "embed_dim": d, "hidden_dim": 2 * d, "num_heads": 2, "head_dim": 32, "num_kv_heads": 2}
    config = qwen3.ModelConfig(vocab_size=n, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=tied, **sizes)
    config.dtype = config.param_dtype = jnp.float32
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    if lora:
        update = qwix.LoraProvider(module_path=".*(_einsum|gate_proj|lm_head)", rank=4, alpha=8.0)
        model = qwix.apply_lora_to_model(model, update, rngs=nnx.Rngs(1), **model.get_model_input())
    return model


def ids(rows, length):
    return rng.integers(3, n, (rows, length)).astype(np.int32)


def lengths(rows, length):
    """Masks of sequences that end somewhere in their last two thirds."""
    return (np.arange(length) < rng.integers(length // 3, length, (rows, 1))).astype(np.int32)


# %% [markdown]
# ## A trainer's step
#
# The trainer's own `train` runs three steps. We record its losses and the final parameters. Then we measure one step
# alone: the memory that its program needs beyond arguments and results, and its time. The time is the best of five runs
# on a two-core CPU, where tunix and jce take turns. Both use the same trainer, batch and initial parameters.


# %%
def run(trainer, batch):
    start = jax.tree.map(jnp.copy, nnx.state(trainer.model))
    trainer.train([batch] * STEPS)
    losses = trainer.metrics_logger.get_metric_history(trainer.config.metrics_prefix, "loss", "train")
    parameters = jax.tree.leaves(nnx.state(trainer.model, nnx.Param))
    nnx.update(trainer.model, start)
    arguments = trainer.model, trainer.optimizer, trainer._prepare_inputs(batch)
    program = nnx.jit(trainer.create_train_step_fn()).lower(*arguments).compile()
    megabytes = program.compiled.memory_analysis().temp_size_in_bytes / 1e6
    return np.array(losses), parameters, megabytes, lambda: jax.block_until_ready(program(*arguments))


def timed(both):
    """With the best of five times of a step, taken in turn, in its place."""
    seconds = np.empty((5, len(both)))
    for i, j in np.ndindex(seconds.shape):
        begin = time.perf_counter()
        both[j][-1]()
        seconds[i, j] = time.perf_counter() - begin
    return [(*rest, best) for (*rest, _), best in zip(both, seconds.min(0), strict=True)]


config = {"eval_every_n_steps": 1000}
results = {}

# %% [markdown]
# ## The head in a copy
#
# Qwen3 computes its logits with `model.lm_head(h)`, or, if it is tied, with `model.embedder.decode(h)`. It then casts
# them with `jnp.astype`. That function accepts only arrays, so the model can't return a `jce.Linear`. Instead, jce's
# loss itself replaces the head, and the model casts and returns the loss. All losses below share these 8 lines.
#
# The loss calls the head while the model is being called, because only then does Qwix add its low-rank update. It calls
# a clone of the head, because Qwix writes to the module.


# %%
def with_head(model, of_states):
    """A copy of the model that computes of_states(h, head) where the model computes head(h)."""
    changed = copy.copy(model)
    if model.config.use_tied_embedding:
        changed.embedder = copy.copy(model.embedder)
        changed.embedder.decode = lambda h: of_states(h, model.embedder.decode)
    else:
        changed.lm_head = lambda h: of_states(h, lambda h: nnx.clone(model.lm_head)(h))
    return changed


# %% [markdown]
# ## SFT
#
# `PeftTrainer` takes its loss as an argument. tunix's default loss builds a one-hot target with an entry for every
# class.


# %%
def sft_loss(model, input_tokens, input_mask, positions, attention_mask):
    def loss(h, head):
        return jce.linear_cross_entropy(input_tokens[:, 1:], h[:, :-1], head, where=input_mask[:, 1:] > 0)

    return with_head(model, loss)(input_tokens, positions, None, attention_mask)[0]


def model_inputs(batch):
    mask = batch.input_mask
    positions, attention = utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask)
    tokens = {"input_tokens": batch.input_tokens, "input_mask": mask}
    return tokens | {"positions": positions, "attention_mask": attention}


length = PROMPT + COMPLETION + 1
text = peft_trainer.TrainingInput(input_tokens=ids(SEQUENCES, length), input_mask=lengths(SEQUENCES, length))
for name, kind in {"SFT, tied": {"tied": True}, "SFT": {}, "SFT, LoRA": {"lora": True}}.items():
    both = []
    for loss in (None, sft_loss):
        trainer = peft_trainer.PeftTrainer(qwen(**kind), optax.sgd(1.0), peft_trainer.TrainingConfig(**config))
        trainer.with_gen_model_input_fn(model_inputs)
        if loss:
            trainer.with_loss_fn(loss)
        both.append(run(trainer, text))
    results[name] = timed(both)

# %% [markdown]
# ## DPO
#
# `DPOTrainer` calls one function for log-probabilities, both for the model and for its reference. We replace that
# function, and clear JAX's caches to discard programs traced with the old one.


# %%
def get_per_token_logps(model, input_tokens, positions, attn_mask, logits_to_keep, images=None):
    def log_probs(h, head):
        return jce.linear_log_probs(input_tokens[:, -logits_to_keep:], h[:, -logits_to_keep - 1 : -1], head).log_prob

    return with_head(model, log_probs)(input_tokens, positions, None, attn_mask)[0]


def replaced(module, **functions):
    for name, function in functions.items():
        setattr(module, name, function)
    jax.clear_caches()


half = SEQUENCES // 2
parts = {"prompt": np.ones((half, PROMPT), np.int32), "chosen": lengths(half, COMPLETION)}
parts["rejected"] = lengths(half, COMPLETION)
pairs = dpo_trainer.TrainingInput(
    **{f"{name}_ids": ids(*mask.shape) for name, mask in parts.items()},
    **{f"{name}_mask": mask for name, mask in parts.items()},
)
both = []
for function in (common.get_per_token_logps, get_per_token_logps):
    replaced(common, get_per_token_logps=function)
    options = dpo_trainer.DPOTrainingConfig(**config, max_prompt_length=PROMPT, max_response_length=COMPLETION)
    trainer = dpo_trainer.DPOTrainer(qwen(tied=True), qwen(tied=True), optax.sgd(1e-3), options)
    both.append(run(trainer, pairs))
results["DPO, tied"] = timed(both)

# %% [markdown]
# ## GRPO
#
# GRPO's loss asks for log-probabilities at a temperature, and also for the logits, from which it reports the entropy.
# `jce.linear_log_probs` computes both in one pass over the head, so the new function returns the entropy instead of
# logits. The model casts a single array, so the two results pass through it as one.


# %%
def compute_per_token_logps(
    graphdef, state, prompt_tokens, completion_tokens, pad_id, eos_id, *, stop_gradient, temperature, **_
):
    model, k = nnx.merge(graphdef, state), completion_tokens.shape[1]
    tokens, positions, mask, _ = common.process_ids(prompt_tokens, completion_tokens, pad_id, eos_id)

    def both(h, head):
        found = jce.linear_log_probs(tokens[:, -k:], h[:, -k - 1 : -1], head, temperature=temperature)
        return jnp.stack([found.log_prob, found.entropy])

    log_prob, entropy = with_head(model, both)(tokens, positions, None, mask)[0]
    return jax.lax.stop_gradient(log_prob) if stop_gradient else (log_prob, entropy)


mask = lengths(SEQUENCES, COMPLETION)
played = common.TrainExample(
    prompt_ids=jnp.asarray(ids(SEQUENCES, PROMPT)),
    prompt_mask=jnp.ones((SEQUENCES, PROMPT), int),
    completion_ids=jnp.asarray(ids(SEQUENCES, COMPLETION)),
    completion_mask=jnp.asarray(mask),
    advantages=jnp.asarray(rng.standard_normal(SEQUENCES), jnp.float32),
    ref_per_token_logps=jnp.asarray(rng.normal(-9.7, 0.1, mask.shape), jnp.float32),
    old_per_token_logps=jnp.asarray(rng.normal(-9.7, 0.1, mask.shape), jnp.float32),
)
grpo = {"loss_algo": "grpo", "loss_agg_mode": "sequence-mean-token-mean", "temperature": 0.9, "epsilon": 0.2}
grpo |= {"beta": 0.04, "kl_loss_mode": "low_var_kl", "kl_clamp_value": None}


def grpo_loss(model, train_example, algo_config):
    return algo_core.grpo_loss_fn(model, train_example, algo_config, pad_id=0, eos_id=1)


theirs = common.compute_per_token_logps, algo_core.compute_entropy_from_logits
both = []
for log_probs, entropy in (theirs, (compute_per_token_logps, lambda entropy: entropy)):
    replaced(common, compute_per_token_logps=log_probs)
    replaced(algo_core, compute_entropy_from_logits=entropy)
    trainer = peft_trainer.PeftTrainer(qwen(), optax.sgd(0.1), peft_trainer.TrainingConfig(**config))
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": types.SimpleNamespace(**grpo)})
    trainer.with_loss_fn(grpo_loss, has_aux=True)
    both.append(run(trainer, played))
results["GRPO"] = timed(both)

# %% [markdown]
# ## Side by side
#
# We compare the losses, and each parameter after three steps. Each difference is divided by the largest entry of the
# losses or of the parameter. DPO's loss depends on differences between sums over words. These sums are about a thousand
# nats, so their rounding errors are visible in DPO's losses.


# %%
#| fig-alt: Bars for five trainers: memory and seconds per step are lower with jce's loss than with tunix' own
def difference(a, b):
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(a, b, strict=True))


names, of_losses, of_parameters = list(results), {}, {}
print(f"{'':10}  first and last loss   differ by   parameters       MB of memory      seconds a step")
for name, (dense, ours) in results.items():
    of_losses[name], of_parameters[name] = difference([ours[0]], [dense[0]]), difference(ours[1], dense[1])
    print(
        f"{name:10} {dense[0][0]:10.5f} {dense[0][-1]:9.5f} {of_losses[name]:11.1e} {of_parameters[name]:12.1e}", end=""
    )
    print(f" {dense[2]:10.0f} → {ours[2]:3.0f} {dense[3]:14.2f} → {ours[3]:.2f}")
figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained", sharey=True)
for axis, at, label in zip(axes, (2, 3), ("MB of temporary memory", "seconds a step"), strict=True):
    for i, (who, colour) in enumerate({"tunix": GREY, "with jce's loss": BLUE}.items()):
        axis.barh(
            np.arange(len(names)) + 0.38 * i, [results[name][i][at] for name in names], 0.38, color=colour, label=who
        )
    axis.set(xlabel=label, yticks=np.arange(len(names)) + 0.19, yticklabels=names)
axes[0].invert_yaxis()
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)

# %% [markdown]
# ## The claim

# %%
assert max(of_losses.values()) < 1e-5, of_losses
assert max(of_parameters.values()) < 5e-6, of_parameters
less = {name: dense[2] / ours[2] for name, (dense, ours) in results.items()}
assert min(less.values()) > 3, less
print(
    f"losses of three steps within {max(of_losses.values()):.0e} of tunix', parameters within"
    f" {max(of_parameters.values()):.0e}; {', '.join(f'{name}: {x:.1f} times' for name, x in less.items())} less memory"
)
