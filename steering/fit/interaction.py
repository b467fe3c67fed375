"""From texts to an interaction plan: the local interaction basis of the residual stream at the inputs of chosen blocks.

    Σ = U D Uᵀ            covariance of x at the node, D > threshold·D_1;      R = U D^{-1/2},  R⁺ = D^{1/2} Uᵀ
    M' = (1/NP) Σ_x Σ_{t,i,s} J̃ᵀ J̃,      J̃ = ∂(C_nextᵀ f(x))_{t,i} / ∂x_s                               (1)
    R⁺ M' R⁺ᵀ = V Λ Vᵀ,      C = R V Λ^{1/2},  C⁺ = Λ^{-1/2} Vᵀ R⁺,      f̂ = (x − μ) C                    (2)

Backwards over the nodes, each against the one behind it; the last is the output of the final norm, where any
orthonormal basis gives the same M', so none is formed. Then Cov(f̂) = Λ, and the Jacobian of the next node's features by
f̂ has orthonormal columns in the mean of (1): Λ_j is how much feature j of unit variance moves what comes behind. Rows
act, x ↦ x C; the mean stands for the constant coordinate of the paper.

The sums over outputs t, i are estimated by `sources` random signs for each text, s_{t,i} = ±1, one vector–Jacobian
product each: E[(sᵀJ)ᵀ(sᵀJ)] = JᵀJ. `sources` 0 sums them one by one, which is the definition and takes P·K products.

Read are the tokens of a text, and of a chat that ends with the assistant those of its answer. Left out are position 0
and, of the covariance, tokens with a massive activation. In a 16-bit model the products are taken in 16 bits; the
decompositions are in float64.
Quality, on held-out texts: the perplexity, over the model's own, after the stored trailing features of all chosen
blocks have gone at once, beside as many trailing principal components and as many random directions.
Cost: a forward pass of the Jacobian's texts and `sources` backward passes through one stretch of blocks, for each node.
Source: Local Interaction Basis, arXiv:2405.10928, Sec. 3; for language models the authors find no substantial gain over
principal components.   Oracle: the Jacobians of the whole sequence formed by autograd; Cov(f̂) = Λ; a linear network.
Of the published code we leave: thresholds in absolute units; integrated gradients, whose Λ is another one; edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steering.artifact import MAX_BYTES, checked_name
from steering.errors import SpecError
from steering.fit.concept import Progress, part_of, provenance
from steering.fit.examples import Example
from steering.fit.settings import chosen_blocks
from steering.fit.subspace import Moments
from steering.fit.trial import Row, Trial, calibration, ratio, within
from steering.law import Law
from steering.plan import MAX_RANK, InteractionPlan
from steering.plant.capture import Pause, capture_each
from steering.plant.plant import Plant
from steering.types import Site

FINAL = Site("final", 0)
MAX_PRODUCTS = 2**17
"""Most vector–Jacobian products of the exact sum at one node: minutes on the embedded model."""
ALIKE = 0.01
"""Log perplexity ratios closer than this are no difference."""


@dataclass(frozen=True, kw_only=True)
class InteractionSettings:
    """What an interaction plan holds, and from how much. Raises SpecError for impossible values."""

    layers: tuple[int, ...] | None = None
    """Blocks whose input gets a basis; null means all but block 0."""
    leading: int = 32
    """Most features that are stored from the beginning: what `remove` can take away."""
    trailing: int = 64
    """Most features that are stored from the end: what `keep` can take away."""
    sources: int = 4
    """Random sources of signs for each text; 0 for the exact sum, which takes a product for each output."""
    tokens: int = 65_536
    """Most tokens of the texts that the means and covariances are formed of."""
    jacobian_tokens: int = 4096
    """Most tokens of the texts along which the blocks are linearised."""
    longest: int = 128
    """Tokens of a text that are read, from its beginning."""
    threshold: float = 1e-8
    """Share of the largest eigenvalue, of Σ and of Λ, below which directions are left out."""
    seed: int = 0
    """Of the signs and of the random directions."""

    def __post_init__(self) -> None:
        ranges = {"leading": (1, MAX_RANK), "trailing": (0, MAX_RANK), "sources": (0, 1024)}
        ranges |= {"tokens": (3, 2**24), "jacobian_tokens": (3, 2**24), "longest": (3, 4096)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise SpecError(name, expected=f"a whole number in {least}..{most}", got=value)
        if not 0 < self.threshold < 1:
            raise SpecError("threshold", expected="a number in (0, 1)", got=self.threshold)

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model with `depth` blocks, ascending. Raises SpecError for one that it does not have."""
        return chosen_blocks(self.layers, depth, range(min(1, depth - 1), depth))

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block that the model does not have, and for an exact sum that would take hours."""
        self.chosen(plant.depth)
        if self.sources == 0 and self.jacobian_tokens * plant.width > MAX_PRODUCTS:
            expected = f"at most {MAX_PRODUCTS // plant.width} with sources 0, a product for each token and coordinate"
            raise SpecError("jacobian_tokens", expected=expected, got=self.jacobian_tokens)


class Basis(NamedTuple):
    """C (D, K), C⁺ (K, D), Λ (K,), descending, and the principal components U (D, k ≥ K) it was made in; float64."""

    C_DK: Tensor
    pinv_KD: Tensor
    lambda_K: Tensor
    U_Dk: Tensor


def fit_interaction(
    plant: Plant,
    name: str,
    positive: Sequence[Example],
    negative: Sequence[Example] = (),
    settings: InteractionSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> InteractionPlan:
    """Fit one plan from calibration texts. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name, setting or row, named) and PlantError (a chat for a model without a template).
    """
    settings = settings or InteractionSettings()
    checked_name(name)
    if negative:
        raise SpecError("negative", expected="no examples here: calibration texts are the positive ones")
    settings.for_model(plant)
    layers, D = settings.chosen(plant.depth), plant.width
    longest = min(settings.longest, plant.context)
    rows, texts = calibration(plant, positive, tokens=settings.tokens, longest=longest, pause=pause)
    moments = _moments(plant, texts.fitted, layers, part_of(progress, "covariances", 0.0, 0.3), pause)
    if any(found.count < 2 for found in moments.values()):
        raise SpecError("positive", expected="texts with two ordinary tokens at every block")

    generator = torch.Generator().manual_seed(settings.seed)
    along = within(texts.fitted, settings.jacobian_tokens)
    bases: dict[int, Basis] = {}
    behind: tuple[Site, Tensor] = (FINAL, torch.eye(D, dtype=torch.float64))
    for done, layer in enumerate(reversed(layers)):
        report = part_of(progress, "interactions", 0.3 + 0.6 * done / len(layers), 0.3 + 0.6 * (done + 1) / len(layers))
        here = Site("resid_pre", layer)
        M_DD = interactions(plant, along, here, behind, settings.sources, generator, report, pause)
        bases[layer] = interaction_basis(moments[layer].covariance(), M_DD, settings.threshold)
        behind = (here, bases[layer].C_DK)
    least = min(len(basis.lambda_K) for basis in bases.values())
    K, M = min(settings.leading, least), min(settings.trailing, least)
    if len(layers) * (K + M) * D * 12 > MAX_BYTES // 2:
        raise SpecError("layers", expected="fewer layers, or fewer features: the plan would pass half a gigabyte")
    plan = _plan(plant, name, layers, moments, bases, (K, M))
    quality = {
        "tokens": [moments[layer].count for layer in layers],
        "massive_tokens": [moments[layer].massive for layer in layers],
        "jacobian_tokens": sum(len(row.ids) - row.start for row in along),
        "ranks": list(plan.ranks),
        "leading_share": [round(float(bases[n].lambda_K[:K].sum() / bases[n].lambda_K.sum()), 4) for n in layers],
        **_removals(plant, texts.measured, plan, generator, pause),
        "measured_on": texts.measured_on,
    }
    if progress:
        progress("done", 1.0)
    made = provenance(asdict(settings) | {"layers": list(layers)}, {"positive": rows})
    return replace(plan, quality=_doubted(quality, D), provenance=made)


def interaction_basis(covariance_DD: Tensor, M_DD: Tensor, threshold: float) -> Basis:
    """Equation (2). Raises SpecError where nothing varies, or nothing that varies reaches the next node."""
    rising_D, U_DD = torch.linalg.eigh(covariance_DD)
    D_D, U_DD = rising_D.flip(0), U_DD.flip(1)
    kept = int((D_D / D_D[0] > threshold).sum()) if D_D[0] > 0 else 0
    if not kept:
        raise SpecError("positive", expected="texts whose states differ")
    root_k, U_Dk = D_D[:kept].sqrt(), U_DD[:, :kept]
    R_Dk, pinv_kD = U_Dk / root_k, root_k[:, None] * U_Dk.mT
    inner_kk = pinv_kD @ M_DD @ pinv_kD.mT
    rising_k, V_kk = torch.linalg.eigh((inner_kk + inner_kk.mT) / 2)
    lambda_k, V_kk = rising_k.flip(0), V_kk.flip(1)
    K = int((lambda_k / lambda_k[0] > threshold).sum()) if lambda_k[0] > 0 else 0
    if not K:
        raise SpecError("positive", expected="texts along which the blocks pass something on")
    lambda_K, V_kK = lambda_k[:K], V_kk[:, :K]
    return Basis(R_Dk @ V_kK * lambda_K.sqrt(), (V_kK / lambda_K.sqrt()).mT @ pinv_kD, lambda_K, U_Dk)


def interactions(
    plant: Plant,
    texts: Sequence[Row],
    here: Site,
    behind: tuple[Site, Tensor],
    sources: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
    pause: Pause | None = None,
) -> Tensor:
    """M' (D, D) of equation (1), float64 on the CPU, over the positions that are read of the texts.

    behind: the next node and its C (D, K). sources: 0 for the exact sum.
    """
    site, C_DK = behind
    shell = plant.shell()
    seen: dict[Site, Tensor] = {}

    def begin(x_BTD: Tensor) -> Tensor:
        seen[here] = x_BTD.detach().requires_grad_()
        return seen[here]

    def end(y_BTD: Tensor) -> Tensor:
        seen[site] = y_BTD
        return y_BTD.detach()  # nothing behind it is differentiated

    plant.tap(shell, here, begin)
    plant.tap(shell, site, end)
    M_DD = torch.zeros(plant.width, plant.width, dtype=torch.float64)
    count = 0
    for done, (ids, start) in enumerate(texts):
        with torch.enable_grad():
            shell.base_model(input_ids=torch.tensor([ids], device=plant.device), use_cache=False)
        x_BTD, y_BTD = seen.pop(here), seen.pop(site)
        for w_TD in _cotangents(start, len(ids), C_DK, sources, generator):
            (g_BTD,) = torch.autograd.grad(y_BTD, x_BTD, w_TD.to(y_BTD)[None], retain_graph=True)
            g_SD = g_BTD[0, start:].double().cpu()
            M_DD += g_SD.mT @ g_SD
            if pause is not None:
                pause()
        count += len(ids) - start
        if progress is not None:
            progress(done + 1, len(texts))
    return M_DD / (count * max(sources, 1))


def _cotangents(start: int, length: int, C_DK: Tensor, sources: int, generator: torch.Generator) -> Iterator[Tensor]:
    """What is pulled back (T, D): random signs over all outputs (t, i) at once, or the outputs one by one."""
    D, K = C_DK.shape
    for _ in range(sources):
        w_TD = C_DK.new_zeros(length, D)
        w_TD[start:] = (torch.randint(0, 2, (length - start, K), generator=generator) * 2.0 - 1.0).to(C_DK) @ C_DK.mT
        yield w_TD
    if sources == 0:
        for t in range(start, length):
            for c_D in C_DK.mT:
                w_TD = C_DK.new_zeros(length, D)
                w_TD[t] = c_D
                yield w_TD


def _moments(
    plant: Plant,
    texts: Sequence[Row],
    layers: Sequence[int],
    progress: Callable[[int, int], None],
    pause: Pause | None,
) -> dict[int, Moments]:
    """Mean and covariance at the inputs of `layers`, without position 0 and massive activations."""
    found = {layer: Moments(plant.width, square=True) for layer in layers}
    capture_each(
        plant,
        [row.ids for row in texts],
        [Site("resid_pre", layer) for layer in layers],
        lambda site, n, x_TD: found[site.layer].add(x_TD),
        [range(row.start, len(row.ids)) for row in texts],
        progress=progress,
        pause=pause,
    )
    return found


def _plan(
    plant: Plant,
    name: str,
    layers: tuple[int, ...],
    moments: dict[int, Moments],
    bases: dict[int, Basis],
    sizes: tuple[int, int],
) -> InteractionPlan:
    """What is stored of the bases; probe and gain share their lengths so that the gain is a unit vector."""
    K, M = sizes
    first, last, spectra = [], [], []
    for basis in (bases[layer] for layer in layers):
        size_K1 = basis.pinv_KD.norm(dim=-1, keepdim=True)
        probe_KD, gain_KD = basis.C_DK.mT * size_K1, basis.pinv_KD / size_K1
        first.append((probe_KD[:K], gain_KD[:K], basis.U_Dk.mT[:K]))
        # The least interacting features, and the least variable components of those that span the same space.
        last.append((probe_KD.flip(0)[:M], gain_KD.flip(0)[:M], basis.U_Dk.mT.flip(0)[:M]))
        spectra.append(torch.nn.functional.pad(basis.lambda_K, (0, plant.width - len(basis.lambda_K))))

    def stacked(parts: list[tuple[Tensor, Tensor, Tensor]], index: int) -> Tensor:
        return torch.stack([part[index] for part in parts]).float()

    return InteractionPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality={},
        provenance={},
        layers=layers,
        mean=torch.stack([moments[layer].mean() for layer in layers]).float(),
        ranks=tuple(len(bases[layer].lambda_K) for layer in layers),
        spectrum=torch.stack(spectra).float(),
        probe=stacked(first, 0),
        gain=stacked(first, 1),
        probe_rest=stacked(last, 0),
        gain_rest=stacked(last, 1),
        pca=stacked(first, 2),
        pca_rest=stacked(last, 2),
    )


def _removals(
    plant: Plant, texts: Sequence[Row], plan: InteractionPlan, generator: torch.Generator, pause: Pause | None
) -> dict[str, Any]:
    """Perplexity ratios after the trailing features, components or random directions have gone at all blocks."""
    n, M, D = plan.probe_rest.shape
    if not M:
        return {"removed": 0}
    sites = [Site("resid_pre", layer) for layer in plan.layers]
    random_nMD = torch.linalg.qr(torch.randn(n, D, M, generator=generator)).Q.mT
    pairs = {
        "interaction": (plan.probe_rest, plan.gain_rest),
        "pca": (plan.pca_rest, plan.pca_rest),
        "random": (random_nMD, random_nMD),
    }
    trial = Trial(plant, texts, sites, [1] * len(texts), pause)
    dense = trial.loss()
    ratios = {}
    for kind, (probes, gains) in pairs.items():
        laws = {
            site: Law.of(probe_MD, probe_MD @ mean_D, gain_MD)
            for site, probe_MD, gain_MD, mean_D in zip(sites, probes, gains, plan.mean, strict=True)
        }
        ratios[kind] = round(ratio(trial.loss(laws), dense), 5)
    return {
        "removed": M,
        "perplexity_ratio": {k: ratios[k] for k in ("interaction", "pca")},
        "random": ratios["random"],
    }


def _doubted(quality: dict[str, Any], width: int) -> dict[str, Any]:
    """The figures, with a warning where they promise nothing."""
    if min(quality["tokens"]) <= width:
        least = min(quality["tokens"])
        return quality | {
            "warning": f"{least} tokens do not span a stream of width {width}: what they do not reach is in no feature."
        }
    found = quality.get("perplexity_ratio")
    if found is not None and math.log(found["interaction"]) > math.log(found["pca"]) - ALIKE:
        return quality | {
            "warning": "The trailing features cost as much perplexity as as many principal components: the interaction "
            "basis has no advantage here, as published for language models."
        }
    if quality["measured_on"] != "held-out":
        return quality | {"warning": "The figures are of the very texts that were fitted: give ten or more."}
    return quality
