"""From the weights to a channels plan: which components of a head's output later heads read, beyond chance.

    W_OV = W_V W_O = Σ_i σ_i u_i v_iᵀ          of head (l, h); rows act, x ↦ x W; rank ≤ d, the width of a head
    CS(W_up, W_down) = ‖W_up W_down‖_F / (‖W_up‖_F ‖W_down‖_F)                                           (1)
    CS_i² = σ_i² ‖v_iᵀ W_down‖² / (‖W_up‖² ‖W_down‖²),      Σ_i CS_i² = CS²                              (2)

    query   W_down = W_Q W_Kᵀ     key   W_down = W_K W_Qᵀ     value   W_down = W_V W_O      of a later head

The norm before the attention scales what W_V, W_Q and W_K read, a norm behind it what W_O writes (Gemma, OLMo-2), so
both gains are multiplied in; what a norm divides by is not a matrix and is left out. So are rotary embeddings and the
norms of single queries and keys: the score of a query or key channel is that of positions without rotation. Heads that
share keys and values have the shared ones. Biases count nowhere.

No matrix (D, D) is formed: QR of both factors and the SVD of d × d give σ, u, v, and ‖vᵀ W_down‖² is a quadratic form
in d numbers, (vᵀ W_Q) (W_Kᵀ W_K) (vᵀ W_Q)ᵀ.

A direction at random scores CS_i² = σ_i² / (‖W_up‖² D) in the mean: `null`. Channels are ranked by CS_i − null, and
what does not exceed the largest such excess of the same heads with random directions in place of the v_i, over as many
comparisons, is chance.
Cost: 3·2·(H k)·D·(H d) multiply-adds for each pair of blocks, k the components of a head that are looked at.
Source: Talking Heads, arXiv:2406.09519, Sec. 3 (composition and its components).   Oracle: the matrices (D, D) formed
explicitly; Σ_i CS_i² = CS².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from steering.artifact import checked_name
from steering.errors import PlantError, SpecError
from steering.fit.concept import Progress
from steering.fit.examples import Example
from steering.fit.settings import chosen_blocks
from steering.plan import ChannelsPlan
from steering.plan.channels import MAX_CHANNELS, Reader
from steering.plant.capture import Pause
from steering.plant.layouts import blocks_of
from steering.plant.plant import Plant
from steering.types import Site

READERS: tuple[Reader, ...] = get_args(Reader)
SILENT = 1e-6
"""Components whose σ is below this share of their head's largest write nothing and are not looked at."""


@dataclass(frozen=True, kw_only=True)
class ChannelsSettings:
    """Which channels are looked for. Raises SpecError for impossible values."""

    kind: Literal["value", "query", "key", "all"] = "all"
    """What of a later head reads the channel."""
    top: int = 64
    """Most channels that are stored."""
    components: int = 8
    """The first so many components of each head are looked at, by σ."""
    layers: tuple[int, ...] | None = None
    """Blocks whose heads are looked at, as writers and as readers; null means all."""
    reach: int | None = None
    """Readers stand at most so many blocks behind the writer; null means any number."""
    seed: int = 0
    """Of the random directions and of the control."""

    def __post_init__(self) -> None:
        if self.kind not in (*READERS, "all"):
            raise SpecError("kind", expected=f"all or one of {', '.join(READERS)}", got=self.kind)
        for name, most in (("top", MAX_CHANNELS), ("components", 1024)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise SpecError(name, expected=f"a whole number in 1..{most}", got=value)
        if self.reach is not None and (type(self.reach) is not int or self.reach < 1):
            raise SpecError("reach", expected="a number >= 1, or null", got=self.reach)

    def chosen(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model with `depth` blocks, ascending. Raises SpecError."""
        layers = chosen_blocks(self.layers, depth)
        if not any(self.is_pair(up, down) for up in layers for down in layers):
            raise SpecError("layers", expected="two blocks or more, no further apart than `reach`", got=list(layers))
        return layers

    def is_pair(self, up: int, down: int) -> bool:
        """Whether heads of block `down` are looked at as readers of those of block `up`."""
        return up < down and (self.reach is None or down - up <= self.reach)

    def for_model(self, plant: Plant) -> None:
        """Raises SpecError for a block that the model does not have, PlantError where it fuses q, k and v."""
        self.chosen(plant.depth)
        for tap in ("q_out", "k_out", "v_out"):
            plant.width_of(Site(tap, 0))


class Writer(NamedTuple):
    """What the H heads of one block write, by the first k components, σ descending.

    sigma (H, d), of all · v (H, k, D), orthonormal rows, as the residual stream receives them · probe (H, k, d) and
    direction (H, k, D), unit rows: the component of an output a of head h is (a·probe) direction, at the attention's
    output.
    """

    sigma_Hd: Tensor
    v_HkD: Tensor
    probe_Hkd: Tensor
    direction_HkD: Tensor

    def is_heard(self) -> Tensor:
        """Boolean (H, k): which components write anything."""
        largest = float(self.sigma_Hd.max())
        return self.sigma_Hd[:, : self.v_HkD.shape[1]] > SILENT * largest


class Inputs(NamedTuple):
    """How the H heads of one block read: maps (H, d, D) of the normed input, what is behind them as Gram matrices
    (H, d, d), and ‖W_down‖² (H,); by kind of reader."""

    map_HdD: dict[Reader, Tensor]
    gram_Hdd: dict[Reader, Tensor]
    square_H: dict[Reader, Tensor]


class Found(NamedTuple):
    """One channel: where it is written and read, and its scores."""

    excess: float
    score: float
    null: float
    up: int
    head: int
    component: int
    down: int
    reader_head: int
    reader: Reader


def fit_channels(
    plant: Plant,
    name: str,
    positive: Sequence[Example] = (),
    negative: Sequence[Example] = (),
    settings: ChannelsSettings | None = None,
    progress: Progress | None = None,
    pause: Pause | None = None,
) -> ChannelsPlan:
    """Fit one plan, from the weights alone. What `pause` or `progress` raises ends the fit.

    Raises SpecError (a bad name or setting, or examples), PlantError (a family that fuses its linear maps, quantised
    weights).
    """
    settings = settings or ChannelsSettings()
    checked_name(name)
    if positive or negative:
        raise SpecError("positive" if positive else "negative", expected="no examples: channels are in the weights")
    settings.for_model(plant)
    layers = settings.chosen(plant.depth)
    kinds = READERS if settings.kind == "all" else (settings.kind,)
    generator = torch.Generator().manual_seed(settings.seed)

    writers: dict[int, Writer] = {}
    best: list[Found] = []
    by_chance, compared, done = 0.0, 0, 0
    pairs = sum(settings.is_pair(up, down) for up in layers for down in layers)
    for down in layers:
        inputs = readers(plant, down)  # of one block at a time: they have the size of the block's own weights
        for up in layers:
            if not settings.is_pair(up, down):
                continue
            made = writers[up]
            random_HkD = _random_rows(made.v_HkD.shape, generator)
            for kind in kinds:
                score_HkH = composition(made.sigma_Hd, made.v_HkD, inputs, kind)
                drawn_HkH = composition(made.sigma_Hd, random_HkD, inputs, kind)
                by_chance = max(by_chance, float((drawn_HkH - _null(made)[..., None]).max()))
                compared += score_HkH.numel()
                best += _top(score_HkH, made, settings.top, (up, down, kind))
            best = sorted(best, key=lambda found: -found.excess)[: settings.top]
            done += 1
            _step(progress, pause, "compositions", done / pairs)
        writers[down] = writer(plant, down, settings.components)
    if not best:
        raise SpecError("layers", expected="blocks whose heads write something", got=list(layers))
    return _plan(plant, name, settings, layers, writers, best, (by_chance, compared), generator)


def writer(plant: Plant, layer: int, components: int) -> Writer:
    """The first components of what each head of a block writes; float64 on the CPU."""
    H, kv, d = plant.heads.count, plant.heads.kv_count, plant.heads.width
    _, _, V_ED = (weight.double() for weight in plant.linears_at(Site("attn_in", layer)))
    O_DE = plant.linears_at(Site("attn_act", layer))[0].double()
    before_D, behind_D = _gains(plant, layer)
    sigmas, vs, probes, directions = [], [], [], []
    for h in range(H):
        g = h // (H // kv)
        A_Dd = (V_ED[g * d : (g + 1) * d] * before_D).mT
        B_dD = O_DE[:, h * d : (h + 1) * d].mT
        R_dd = torch.linalg.qr(A_Dd, mode="r").R
        P_Dd, S_dd = torch.linalg.qr((B_dD * behind_D).mT)
        U_dd, sigma_d, Vh_dd = torch.linalg.svd(R_dd @ S_dd.mT)
        v_kD = Vh_dd[:components] @ P_Dd.mT
        # What u_i makes of the attention's output itself: σ_i v_i where no norm stands behind it.
        written_kD = U_dd.mT[:components] @ R_dd @ B_dD / sigma_d[:components, None].clamp_min(1e-30)
        size_k1 = written_kD.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        sigmas.append(sigma_d)
        vs.append(v_kD)
        probes.append(v_kD @ (B_dD * behind_D).mT * size_k1)
        directions.append(written_kD / size_k1)
    return Writer(*(torch.stack(parts) for parts in (sigmas, vs, probes, directions)))


def readers(plant: Plant, layer: int) -> Inputs:
    """How each head of a block reads its input; float64 on the CPU."""
    H, kv, d = plant.heads.count, plant.heads.kv_count, plant.heads.width
    before_D, behind_D = _gains(plant, layer)
    Q, K, V = (weight.double() * before_D for weight in plant.linears_at(Site("attn_in", layer)))
    O_DE = plant.linears_at(Site("attn_act", layer))[0].double() * behind_D[:, None]
    Q_HdD = Q.view(H, d, -1)
    K_HdD, V_HdD = (w.view(kv, d, -1).repeat_interleave(H // kv, dim=0) for w in (K, V))
    O_HdD = O_DE.mT.reshape(H, d, -1)
    gram = {name: w @ w.mT for name, w in (("q", Q_HdD), ("k", K_HdD), ("v", V_HdD), ("o", O_HdD))}
    behind: dict[Reader, Tensor] = {"query": gram["k"], "key": gram["q"], "value": gram["o"]}
    own: dict[Reader, Tensor] = {"query": gram["q"], "key": gram["k"], "value": gram["v"]}
    square = {kind: (own[kind] * behind[kind]).sum((-1, -2)) for kind in READERS}  # ‖XᵀY‖² = ⟨X Xᵀ, Y Yᵀ⟩
    return Inputs({"query": Q_HdD, "key": K_HdD, "value": V_HdD}, behind, square)


def composition(sigma_Hd: Tensor, v_HkD: Tensor, inputs: Inputs, kind: Reader) -> Tensor:
    """CS_i of the first k components of every head with every head behind it: equation (2), (H, k, H)."""
    read_HkHd = torch.einsum("akD,bdD->akbd", v_HkD, inputs.map_HdD[kind])
    square_HkH = torch.einsum("akbd,bde,akbe->akb", read_HkHd, inputs.gram_Hdd[kind], read_HkHd).clamp_min(0)
    up_H = sigma_Hd.square().sum(-1).clamp_min(1e-300)
    part_Hk = sigma_Hd[:, : v_HkD.shape[1]].square() / up_H[:, None]
    return (part_Hk[..., None] * square_HkH / inputs.square_H[kind].clamp_min(1e-300)).sqrt()


def _null(made: Writer) -> Tensor:
    """What each of the first k components would score in a random direction, root mean square, (H, k)."""
    _, k, D = made.v_HkD.shape
    square_Hd = made.sigma_Hd.square()
    share_Hk = square_Hd[:, :k] / square_Hd.sum(-1, keepdim=True).clamp_min(1e-300)
    return (share_Hk / D).sqrt()


def _top(score_HkH: Tensor, made: Writer, top: int, where: tuple[int, int, Reader]) -> list[Found]:
    """The channels of one pair of blocks that lie furthest above their null."""
    up, down, kind = where
    null_Hk = _null(made)
    excess_HkH = (score_HkH - null_Hk[..., None]).where(made.is_heard()[..., None], -torch.inf)
    values, places = excess_HkH.flatten().topk(min(top, excess_HkH.numel()))
    found = []
    for excess, place in zip(values.tolist(), places, strict=True):
        if excess == -torch.inf:
            break
        h, i, reader_head = (int(n) for n in torch.unravel_index(place, score_HkH.shape))
        score, null = float(score_HkH[h, i, reader_head]), float(null_Hk[h, i])
        found.append(Found(excess, score, null, up, h, i, down, reader_head, kind))
    return found


def _plan(
    plant: Plant,
    name: str,
    settings: ChannelsSettings,
    layers: tuple[int, ...],
    writers: dict[int, Writer],
    best: list[Found],
    chance: tuple[float, int],
    generator: torch.Generator,
) -> ChannelsPlan:
    """The plan of the best channels, with a control for each."""
    controls = _controls(best, writers, generator)

    def rows(part: Literal["probe_Hkd", "direction_HkD"], places: list[tuple[int, int, int]]) -> Tensor:
        return torch.stack([getattr(writers[layer], part)[head, i] for layer, head, i in places]).float()

    chosen = [(found.up, found.head, found.component) for found in best]
    sigma = torch.stack([writers[layer].sigma_Hd[head, i] for layer, head, i in chosen])
    whole = torch.stack([writers[layer].sigma_Hd[head].square().sum() for layer, head, _ in chosen])
    by_chance, compared = chance
    above = sum(found.excess > by_chance for found in best)
    quality: dict[str, Any] = {
        "measured_on": "weights",
        "excess": [round(found.excess, 5) for found in best],
        "random": {"excess": round(by_chance, 5)},
        "above_random": above,
        "compared": compared,
    }
    if not above:
        quality["warning"] = (
            "No channel scores above the best of as many random directions: what is stored may be chance."
        )
    return ChannelsPlan(
        name=name,
        model=plant.fingerprint,
        depth=plant.depth,
        width=plant.width,
        quality=quality,
        provenance={"settings": asdict(settings) | {"layers": list(layers)}, "data": "weights"},
        above=above,
        heads=plant.heads.count,
        head_width=plant.heads.width,
        source_layer=tuple(found.up for found in best),
        source_head=tuple(found.head for found in best),
        component=tuple(found.component for found in best),
        reader_layer=tuple(found.down for found in best),
        reader_head=tuple(found.reader_head for found in best),
        reader=tuple(found.reader for found in best),
        probe=rows("probe_Hkd", chosen),
        direction=rows("direction_HkD", chosen),
        sigma=sigma.float(),
        share=(sigma.square() / whole.clamp_min(1e-300)).float(),
        score=torch.tensor([found.score for found in best]),
        null=torch.tensor([found.null for found in best]),
        control_head=tuple(head for _, head, _ in controls),
        control_component=tuple(i for *_, i in controls),
        control_probe=rows("probe_Hkd", controls),
        control_direction=rows("direction_HkD", controls),
    )


def _controls(best: list[Found], writers: dict[int, Writer], generator: torch.Generator) -> list[tuple[int, int, int]]:
    """A random component of a random head of the same block for each channel: one written by no stored channel where
    there is one. Channels of one component have one control."""
    taken = {(found.up, found.head, found.component) for found in best}
    given: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    for found in best:
        own = (found.up, found.head, found.component)
        if own in given:
            continue
        every = [(found.up, h, i) for h, i in writers[found.up].is_heard().nonzero().tolist()]
        pool = [place for place in every if place not in taken and place not in given.values()]
        pool = pool or [place for place in every if place not in given.values()]
        given[own] = pool[int(torch.randint(len(pool), (1,), generator=generator))]
    return [given[found.up, found.head, found.component] for found in best]


def _gains(plant: Plant, layer: int) -> tuple[Tensor, Tensor]:
    """Gains (D,) of the norms before and behind a block's attention, float64; ones where there is none."""
    block = blocks_of(plant.model, plant.layout)[layer]
    found = []
    for path in (plant.layout.attn_norm, plant.layout.attn_post):
        ones_D = torch.ones(plant.width, dtype=plant.dtype, device=plant.device)
        # The norm of a vector of ones is its gain, whatever the family adds to its weight.
        with torch.no_grad():
            gain_D = ones_D if path is None else _norm(block, path)(ones_D)
        found.append(gain_D.double().cpu())
    return found[0], found[1]


def _norm(block: nn.Module, path: str) -> nn.Module:
    try:
        return block.get_submodule(path)
    except AttributeError as error:
        raise PlantError(f"This architecture has no norm {path!r} to read the gain of.", param="model") from error


def _random_rows(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows (H, k, D), float64."""
    H, k, D = shape
    return torch.linalg.qr(torch.randn(H, D, k, generator=generator, dtype=torch.float64)).Q.mT.contiguous()


def _step(progress: Progress | None, pause: Pause | None, stage: str, done: float) -> None:
    if progress:
        progress("done" if done >= 1 else stage, done)
    if pause is not None:
        pause()
