# %% [markdown]
# # Distillation: all of a teacher's probabilities, or 17 numbers a word, teach more than the text, and no logits exist
#
# A student learns from a teacher by minimising
#
# $$\mathrm{KL}(p \Vert q) = \sum_i p_i \log \frac{p_i}{q_i} \qquad p = \mathrm{softmax}(W_p h_p) \qquad
# q = \mathrm{softmax}(W_q h_q)$$
#
# in the mean over tokens, where $p$ is the teacher's and fixed (Hinton, Vinyals and Dean, 2015). As it stands it makes
# the logits of both for all tokens. `jce.linear_kl_divergence(Linear(h_p, W_p), Linear(h_q, W_q))` is the same number
# from some hundred tokens' logits at a time, whatever the two widths, in four products with a head: one each for the
# logits, two for the student's derivatives.
#
# The teacher is the next-word model of `examples/next_word.py`, of width 64, on Python's own documentation. Its
# students have width 16. `python -m notebooks.examples.distill` does the same with a text of yours.

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
*_, taught = next_word.train(corpus, STEPS)
teacher, unigram = taught.model, next_word.unigram_perplexity(corpus)
print(f"words: {corpus.text.size:,}, a tenth held out; vocabulary: {len(corpus.words):,}")
print(f"perplexity of the words held out: {unigram:.1f} by frequency alone, {taught.perplexity:.1f} the teacher's")

# %% [markdown]
# ## What is kept of a teacher
#
# Where a teacher is too large to run beside its student, its likeliest classes are kept: here 16 words a place, found
# by `linear_map` of `lax.top_k`, with the log-probability of each and of all other words together. These are 17
# outcomes, and so are the student's, by `log_probs_with_integer_labels(words, x, tail=True)`. So
#
# $$\mathrm{KL} = \sum_k p_k \log \frac{p_k}{q_k} +
# \Big(1 - \sum_k p_k\Big) \log \frac{1 - \sum_k p_k}{1 - \sum_k q_k}$$
#
# is a divergence: never below 0, and 0 where the two agree. What is often written, the sum over $k$ alone, is neither.

# %%
words, log_p = distill.likeliest(teacher, corpus.text)
place = int(corpus.held_out[40])
print("after “" + " ".join(corpus.words[corpus.text[place - next_word.CONTEXT : place]]) + "”:")
print(", ".join(f"{corpus.words[w]} {np.exp(p):.3f}" for w, p in zip(words[place][:8], log_p[place][:8], strict=True)))
print(f"all but 16 words have {np.exp(log_p[corpus.held_out, -1]).mean():.2f} of the probability, in the mean")

# %% [markdown]
# ## Three lessons
#
# Students of the same start see the same batches, and learn from every word's probability, from the 16 and the text,
# half and half, or from the text alone, as the teacher did. Three times, with other batches.

# %%
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
distill.picture(histories[0], taught.perplexity, unigram, spent).savefig(png := io.BytesIO(), dpi=60)
png.seek(0)
axes = plt.figure(figsize=(13.5, 6), dpi=80).add_axes((0, 0, 1, 1))
axes.imshow(plt.imread(png), interpolation="none", aspect="auto")
axes.axis("off")
plt.show()

# %% [markdown]
# Of words that neither has seen, the teacher's probabilities teach a little more than the text, each time, and 16 of
# them with the text nearly as much as all. What is left is the width: 16 numbers a word can't say what 64 do.
#
# ## The claim
#
# Each loss and its gradient are, to rounding, those of whole logits, at the start and after training; a student that
# descends on whole logits takes the same course, within 1e-3 in its first 20 steps; and in chunks a batch takes less
# than a sixth of the memory.


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
assert taught.perplexity < min(perplexity["every word"]) < max(perplexity["the text"]) < unigram
less = min(logits.megabytes / chunks.megabytes for chunks, logits in spent.values())
print(
    f"the three losses are those of whole logits, in at least {less:.0f} times less memory; each of three times a"
    " student learns more from the teacher's probabilities, of all words or of 16, than from the text alone"
)
