# %% [markdown]
# # Distillation: a teacher's probabilities, all or 17 numbers per word, teach more than the text, with logits in chunks
#
# A student learns from a teacher by minimizing
#
# $$\mathrm{KL}(p \Vert q) = \sum_i p_i \log \frac{p_i}{q_i} \qquad p = \mathrm{softmax}(W_p h_p) \qquad
# q = \mathrm{softmax}(W_q h_q)$$
#
# averaged over tokens, where $p$ is the teacher's distribution and is fixed (Hinton, Vinyals and Dean, 2015). Evaluated
# as written, this loss needs both models' logits for all tokens.
# `jce.linear_kl_divergence(Linear(h_p, W_p), Linear(h_q, W_q))` returns the same number, but computes the logits of
# some hundred tokens at a time. The two widths may differ. It takes four matmuls with a head: one for the logits of
# each model, and two for the student's derivatives.
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
*_, taught = next_word.train(corpus, STEPS)
teacher, unigram = taught.model, next_word.unigram_perplexity(corpus)
print(f"words: {corpus.text.size:,}, a tenth held out; vocabulary: {len(corpus.words):,}")
print(f"perplexity of the words held out: {unigram:.1f} by frequency alone, {taught.perplexity:.1f} the teacher's")

# %% [markdown]
# ## What is kept of a teacher
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
words, log_p = distill.likeliest(teacher, corpus.text)
place = int(corpus.held_out[40])
print("after “" + " ".join(corpus.words[corpus.text[place - next_word.CONTEXT : place]]) + "”:")
print(", ".join(f"{corpus.words[w]} {np.exp(p):.3f}" for w, p in zip(words[place][:8], log_p[place][:8], strict=True)))
print(f"all but 16 words have {np.exp(log_p[corpus.held_out, -1]).mean():.2f} of the probability, in the mean")

# %% [markdown]
# ## Three lessons
#
# Three students start from the same parameters and see the same batches. One learns from every word's probability, one
# from the 16 words and the text, with equal weights, and one from the text alone, as the teacher did. We repeat this
# three times, with different seeds.

# %%
#| fig-alt: Perplexity of three students falls alike to 360; chunks take less memory and time than whole logits
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
# On held-out words, the teacher's probabilities teach a little more than the text, every time. The 16 words with the
# text teach nearly as much as all probabilities. The remaining gap to the teacher comes from the width: a hidden state
# of 16 numbers can't express what 64 can.
#
# ## The claim
#
# At the start and after training, each loss and its gradient equal those computed from whole logits, up to rounding. A
# student trained on whole logits takes the same course: in the first 20 steps, its losses differ by at most 1e-3 of
# their size. With chunks, a batch takes less than a sixth of the memory.


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
