# %% [markdown]
# # Distillation: students learn more with a teacher's probabilities (all, or 17 per word) than from the text alone
#
# A student learns from a teacher by minimizing
#
# $$\mathrm{KL}(p \Vert q) = \sum_i p_i \log \frac{p_i}{q_i} \qquad p = \mathrm{softmax}(W_p h_p) \qquad
# q = \mathrm{softmax}(W_q h_q)$$
#
# averaged over tokens, where $p$ is the teacher's distribution and is fixed (Hinton, Vinyals and Dean, 2015). Evaluated
# as written, this loss needs both models' logits for all tokens.
# `jce.linear_kl_divergence(Linear(h_p, W_p), Linear(h_q, W_q))` returns the same number, but computes the logits of
# a few hundred tokens at a time. The two widths may differ. Value and gradient take four matmuls with a head: one for
# the logits of each model, and two for the student's derivatives.
#
# The teacher is the next-word model of `examples/next_word.py`, with width 64, trained on Python's own documentation.
# Its students have width 16. `python -m notebooks.examples.distill` does the same with a text that you choose.

# %%
import io

import jax
import matplotlib.pyplot as plt
import numpy as np

from examples import distill, next_word
from examples.distill import LESSONS
from jce.demo import default_text

STEPS = 300
corpus = next_word.read(default_text())
*_, trained = next_word.train(corpus, STEPS)
teacher, unigram = trained.model, next_word.unigram_perplexity(corpus)
print(f"words: {corpus.text.size:,}, a tenth held out; vocabulary: {len(corpus.words):,}")
print(f"perplexity of the held-out words: {unigram:.1f} by frequency alone, {trained.perplexity:.1f} by the teacher")

# %% [markdown]
# ## Storing the teacher's top-k words
#
# If a teacher is too large to run beside its student, you can store only its top-k classes. Here they are the top 16
# words at each place of the text, found with `lax.top_k` inside `linear_map`. We store the log-probability of each of
# them and that of all other words together. These 17 log-probabilities define a distribution over 17 classes.
# `log_probs_with_integer_labels(words, x, tail=True)` returns the student's log-probabilities for the same classes. So
#
# $$\mathrm{KL} = \sum_k p_k \log \frac{p_k}{q_k} +
# \Big(1 - \sum_k p_k\Big) \log \frac{1 - \sum_k p_k}{1 - \sum_k q_k}$$
#
# is a divergence: it is never negative, and it is 0 only if the two distributions agree. A common alternative, the sum
# over $k$ alone, has neither property.

# %%
words, log_p = distill.top_words(teacher, corpus.text)
place = int(corpus.held_out[40])
print("after “" + " ".join(corpus.words[corpus.text[place - next_word.CONTEXT : place]]) + "”:")
print(", ".join(f"{corpus.words[w]} {np.exp(p):.3f}" for w, p in zip(words[place][:8], log_p[place][:8], strict=True)))
print(f"all words except the top 16 have a probability of {np.exp(log_p[corpus.held_out, -1]).mean():.2f}, on average")

# %% [markdown]
# ## Three students
#
# Three students start from the same parameters and see the same batches. One learns from every word's probability, one
# from the 16 words and the text, with equal weights, and one from the text alone, as the teacher did. We repeat this
# three times, with different seeds.

# %%
#| fig-alt: Perplexity of three students falls to about 360; chunks take less memory and time than all logits at once
SEEDS = 3
histories = [
    {name: list(distill.lesson(corpus, name, teacher, STEPS, seed=k)) for name in LESSONS} for k in range(SEEDS)
]
spent = {name: distill.costs(corpus, name, teacher) for name in LESSONS}


def apart(student):
    return float(distill.distance(student, corpus.text, corpus.held_out, teacher))


perplexity = {name: [of[name][-1].perplexity for of in histories] for name in LESSONS}
divergence = {name: [apart(of[name][-1].model) for of in histories] for name in LESSONS}
print(f"{'learns from':24}{'perplexity':^24}{'KL from the teacher':^24}")
for name in LESSONS:
    print(
        f"{name:24}" + "".join(f"{x:8.1f}" for x in perplexity[name]) + "".join(f"{x:8.3f}" for x in divergence[name])
    )
distill.picture(histories[0], trained.perplexity, unigram, spent).savefig(png := io.BytesIO(), dpi=60)
png.seek(0)
axes = plt.figure(figsize=(13.5, 6), dpi=80).add_axes((0, 0, 1, 1))
axes.imshow(plt.imread(png), interpolation="none", aspect="auto")
axes.axis("off")
plt.show()

# %% [markdown]
# With every seed, the students of the teacher's probabilities have a slightly lower perplexity on held-out words than
# the student of the text. The 16 words with the text are nearly as good as all probabilities. The teacher is still much
# better, because its hidden states have 64 numbers and those of the students have 16.
#
# ## The claim
#
# At the start and after training, each loss and its gradient equal those computed from all logits at once, up to
# rounding. Training with all logits at once gives the same losses in the first 20 steps, up to a relative difference of
# 1e-3. With chunks, a batch takes less than a sixth of the memory.


# %%
def course(objective, given, steps=20):
    history = next_word.train(corpus, steps, width=distill.STUDENT, objective=objective, given=given)
    return [snapshot.loss for snapshot in history][1:]


places = corpus.training[:4096]
for name, (in_chunks, of_whole_logits, given, *_) in LESSONS.items():
    given = given(teacher, corpus.text)
    for student in (histories[0][name][0].model, histories[0][name][-1].model):
        ours, dense = (
            jax.jit(jax.value_and_grad(f))(student, corpus.text, places, *given) for f in (in_chunks, of_whole_logits)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    np.testing.assert_allclose(course(in_chunks, given), course(of_whole_logits, given), rtol=1e-3)
    chunks, logits = spent[name]
    assert 6 * chunks.megabytes < logits.megabytes

for found in (perplexity, divergence):
    for every, some, text in zip(*found.values(), strict=True):
        assert every < some < text
assert trained.perplexity < min(perplexity["every word"]) < max(perplexity["the text"]) < unigram
less = min(logits.megabytes / chunks.megabytes for chunks, logits in spent.values())
print(
    f"the three losses equal those computed from all logits at once, in at least {less:.0f} times less memory; with"
    " each of three seeds, students learn more from the teacher's probabilities, of all words or of 16, than from the"
    " text"
)
