"""Every tolerance of the suite, by package, with its reason. Append; do not reorder."""

from __future__ import annotations

from typing import Any

CONTROL: dict[str, Any] = {
    # float64 recursion against itself in another form; up to 6 layers, condition up to about 1e4
    "recursion": {"rtol": 1e-8, "atol": 1e-10},
    # least squares over the horizon: its own error is the condition of √Q blocks up to 3^6 apart
    "horizon": {"rtol": 1e-7, "atol": 1e-9},
    # scipy's and slycot's algebraic solvers, relative to the largest entry
    "algebraic": 1e-11,
    # two orders of rounding of one formula, relative to the largest entry
    "identity": 1e-12,
    # least eigenvalue of S, as a share of the largest: rounding of a symmetric eigensolver
    "negative": 1e-13,
    # output regulation by products against the dense recursion, relative to the largest entry
    "matrix_free": 1e-10,
    # the same where each product is rounded to float32 (6e-8)
    "matrix_free_float32": 1e-5,
    # central differences at step 1e-5 in float64: truncation 1e-10, rounding 1e-11 of each entry
    "finite_difference": 1e-7,
}

PLANT: dict[str, Any] = {
    # float32 against itself with another attention kernel or another batch shape; logits of size 1 to 5
    "float32": {"rtol": 1e-4, "atol": 2e-5},
    # Jacobians in float64 where every operation is (gpt2), relative to the norm
    "jacobian_float64": 1e-13,
    # the same through norms and softmaxes that compute in float32 (6e-8), jvp against vjp
    "jacobian_mixed": 2e-6,
    # float32 Jacobian against autograd through the whole sequence, relative to the norm
    "jacobian_float32": 1e-5,
    # central differences at step 1e-2 through float32 norms: rounding 6e-8 · |f| / 1e-2, truncation step²
    "finite_difference": 2e-3,
    # the same at step 1e-4 in float64 throughout: truncation 1e-8 of a third derivative, rounding 1e-12
    "finite_difference_float64": 1e-7,
}

KERNELS: dict[str, Any] = {
    # float32 sums of up to 4096 terms (cascaded, so far below 4096 · 6e-8), relative to the largest they could reach
    "float32": 3e-6,
    "float64": 1e-14,
    # storing y: half a unit in the last place, relative to the element
    "stored": {"float64": 1.2e-16, "float32": 6e-8, "bfloat16": 2**-8 * 1.01, "float16": 2**-11 * 1.01},
    # Triton's interpreter truncates where a GPU rounds: a whole unit in the last place
    "stored_interpreted": {"float32": 6e-8, "bfloat16": 2**-7, "float16": 2**-10},
    # a bound on effort, relative: the rounding of one float32 norm, product and quotient
    "bound": 2e-6,
    # an angle from a polynomial in float32, of up to π: two units in its last place
    "angle": 5e-7,
    # share of a norm's half-precision outputs that are another order of the sum's, bit for bit: measured .9998
    "same_in_half": 0.999,
}

CORE: dict[str, Any] = {
    # a law against its closed form, and a method against its formula along four layers, float64: tens of roundings
    "law": {"rtol": 1e-12, "atol": 1e-12},
    # the same where the law is resident in float32
    "float32": {"rtol": 1e-5, "atol": 1e-6},
    # bound on effort, relative: rounding of one norm and one product
    "bound": 1e-12,
    # a mean of float32 states against float64 sums, and the planted direction it should be
    "mean": {"rtol": 1e-5, "atol": 1e-6},
    # perplexity: float32 logits of a padded batch against one token at a time, relative
    "perplexity": 1e-4,
    # a closed formula against scipy's, both float64
    "interval": 1e-12,
}

DEMO: dict[str, Any] = {
    # judges against the generator's latents over 400 answers: 1 % of sentences are noise, and an answer may by chance
    # express nothing (three sentences in ten thousand cases of six)
    "judge_agreement": 0.98,
    # share of known trigrams against a table of 3,000 documents (measured .85); 30,000 raise it to .96
    "fluency_fresh": 0.8,
    "fluency_shuffled": 0.35,
    # nats per token of the answers, three batches; an untrained model has 7.6
    "held_out_loss": 1.0,
    # share of 24 answers that do what the system prompt asks; the gate measures 96 and asks for more
    "asked": 0.6,
    # of 24 harmful requests, how many more are refused than of 24 harmless ones
    "refusal_gap": 18,
}

RUNTIME: dict[str, Any] = {
    # float32 log-probabilities through 3 layers, packed and batched against one at a time; logits of size 1 to 5
    "logprob": 1e-4,
    # float64 sums of up to tens of float32 readings, in two orders
    "sums": {"rel": 1e-12, "abs": 1e-12},
    # float32 projections of size 1 to 10 through 3 layers, in batches of two shapes
    "receipt": {"rel": 1e-3, "abs": 1e-4},
}

FIT: dict[str, Any] = {
    # perplexity ratios are rounded to four places; float32 losses of 5 nats differ by 1e-5 between batch shapes
    "perplexity_ratio": 2e-4,
    # a bisected increase of 0.05 in perplexity: it ends within 2 % of it
    "perplexity_met": 1.1e-3,
    # the same where one coordinate of a site of 32 is a step of it
    "perplexity_step": 3e-2,
}

CAPACITY_NOISE = 0.06
"""Of a simulated mean beside its closed form: some ten thousand draws, and the beginning and end of a run."""
