"""Saturated output feedback on a batch in which every token follows its own program, or none.

For a token t with program s = slot_t, channels j = 1 … R, and the norm ‖x‖ floored at the smallest normal float32,

    z_j = c_j·x where that is above knee_j, else floor_j             measured                           (1)
    w_j = a_j clip(r̂_j − z_j, ±limit_j)                              0 exactly where a_j = 0 or g_j = 0 (2)
    ũ_j = clip(w_j, ±min(cap_j, avail) ‖x‖ / ‖g_j‖),                 avail = max(budget − spent, 0)     (3)
    u   = Σ_j ũ_j g_j,   ρ = ‖u‖ / ‖x‖;   if ρ > avail:  u ← u avail/ρ,  ρ ← avail                      (4)
    y ← y + u,   spent ← spent + ρ,   effort ← effort + ρ                                               (5)

with c = probe, g = gain, a = strength, and r̂ the setpoint r, times ‖x‖ where relative_j ≠ 0. A knee and floor of −b
read a ReLU feature of bias b, a knee of θ − b a JumpReLU one; a knee of −∞ is none. Equation (2) is the rank-R form of
A-LQR's u = K (β − v·x) v (arXiv 2604.19018, Sec. 4); (3) and (4) bound the relative effort of one channel and of one
request over its layers.

Arithmetic is in float32 (float64 where y is float64), and y is rounded once. Three properties are promised:

* a token of slot 0 keeps every output bit for bit, and one whose channels all have strength 0 keeps y and spent;
* a token's result does not depend on which other tokens are in the batch;
* overflow stays visible: without a cap or budget, an immense setpoint gives ρ = inf instead of a plausible number.

`reference` defines the operator and is its implementation on a CPU without numba; `kernels._feedback_cpu` is compiled
for a CPU, `kernels._launch` holds the Triton kernel, one launch for the whole batch. Each is imported by its first use.
Legend: T tokens · D width of the read site · E width of the write site · R channels · S program slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kernels._library import define

TINY = torch.finfo(torch.float32).tiny
"""Floor of ‖x‖, so that a zero row has a finite effort."""

CHUNK = 1 << 17
"""Most elements of a (tokens, R, width) temporary of the reference. Half a megabyte stays in a core's cache: 512 tokens
with mixed programs of rank 4 at width 192 take 0.9 ms where 1 << 20 takes 2.4."""


def feedback_(
    y_TE: Tensor,
    x_TD: Tensor,
    slot_T: Tensor,
    probe_SRD: Tensor,
    gain_SRE: Tensor,
    norm_SR: Tensor,
    limit_SR: Tensor,
    knee_SR: Tensor,
    floor_SR: Tensor,
    relative_SR: Tensor,
    setpoint_TR: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """Equations (1) to (5) for every token of a batch, in one launch.

    y_TE         mutated: rows at the write site, last dimension contiguous, any row stride
    x_TD         rows at the read site; may be y itself, since a row is read whole before it is written
    slot_T       int32 row of the bank; 0 means no program, and no output of that token is touched
    probe_SRD    c, gain_SRE g: the bank, float32 or the dtype of y
    norm_SR      ‖g‖ float32; limit_SR float32, ≥ 0, +inf where there is none
    knee_SR      float32, −inf where there is none; floor_SR float32, z below the knee
    relative_SR  float32, not 0 where the setpoint counts in ‖x‖
    setpoint_TR  r, strength_TR a, cap_TR ≥ 0 (+inf: none): float32 knobs, any strides
    budget_T     float32 ≥ 0, what ρ may sum to over the layers, +inf where there is none
    spent_T      mutated float32: that sum so far
    measured_TR  mutated float32, any strides: z, after the knee
    effort_T     mutated float32: ρ is added
    saturated_T  mutated int32: set to 1 where a limit, a cap or the budget bit

    Raises ValueError when the shapes disagree and a token has a program, or, on a GPU, when rows of y, x, probe or gain
    are not contiguous. A slot beyond the bank raises IndexError on a CPU; on a GPU that check would cost a wait.
    """
    _feedback(
        y_TE,
        x_TD,
        slot_T,
        probe_SRD,
        gain_SRE,
        norm_SR,
        limit_SR,
        knee_SR,
        floor_SR,
        relative_SR,
        setpoint_TR,
        strength_TR,
        cap_TR,
        budget_T,
        spent_T,
        measured_TR,
        effort_T,
        saturated_T,
    )


def reference(
    y_TE: Tensor,
    x_TD: Tensor,
    slot_T: Tensor,
    probe_SRD: Tensor,
    gain_SRE: Tensor,
    norm_SR: Tensor,
    limit_SR: Tensor,
    knee_SR: Tensor,
    floor_SR: Tensor,
    relative_SR: Tensor,
    setpoint_TR: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """The operator in plain torch, on any device; arguments as `feedback_`.

    Products are formed elementwise and summed over one dimension, never by a matrix product, whose blocking (and so
    rounding) would depend on how many rows there are.
    With several CPU threads torch cuts the sum of a lone row wider than 32,768; up to there it does not depend on them.
    """
    if not any(slot_T.tolist()):
        return
    bank = (probe_SRD, gain_SRE, norm_SR, limit_SR, knee_SR, floor_SR, relative_SR)
    knobs = (slot_T, setpoint_TR, strength_TR, cap_TR, budget_T)
    tokens = (y_TE, x_TD, *knobs, spent_T, measured_TR, effort_T, saturated_T)
    check_shapes(bank, tokens)
    stride = max(1, CHUNK // (norm_SR.shape[1] * max(x_TD.shape[1], y_TE.shape[1])))
    if slot_T.shape[0] <= stride:
        _control(bank, *tokens)
        return
    for start in range(0, slot_T.shape[0], stride):
        _control(bank, *(each[start : start + stride] for each in tokens))


def _control(
    bank: tuple[Tensor, ...],
    y_TE: Tensor,
    x_TD: Tensor,
    slot_T: Tensor,
    setpoint_TR: Tensor,
    strength_TR: Tensor,
    cap_TR: Tensor,
    budget_T: Tensor,
    spent_T: Tensor,
    measured_TR: Tensor,
    effort_T: Tensor,
    saturated_T: Tensor,
) -> None:
    """Equations (1) to (5) for as many tokens as fit the cache."""
    slots = slot_T.tolist()
    if not any(slots):
        return
    rows = slot_T.nonzero().squeeze(1) if 0 in slots else None

    def take(values: Tensor) -> Tensor:
        return values if rows is None else values.index_select(0, rows)

    def put(values: Tensor, new: Tensor) -> None:
        values.copy_(new) if rows is None else values.index_copy_(0, rows, new.to(values.dtype))

    def add(values: Tensor, new: Tensor) -> None:
        values.add_(new) if rows is None else values.index_add_(0, rows, new.to(values.dtype))

    programs = set(slots) - {0}
    # One program, as in a prompt: its bank row broadcasts, nothing is copied.
    slot = programs.pop() if len(programs) == 1 else take(slot_T)

    def own(values: Tensor) -> Tensor:
        return values[slot] if isinstance(slot, int) else values.index_select(0, slot)

    probe, gain, norm, limit = map(own, bank[:4])
    knee_SR, floor_SR, relative_SR = bank[4:]

    # (1)
    x = take(x_TD).to(torch.float64 if y_TE.dtype == torch.float64 else torch.float32)
    size_T1 = _norm(x).clamp_min_(TINY)
    z_TR = (x.unsqueeze(1) * probe).sum(-1)
    if knee_SR.amax().item() != -math.inf:  # of the whole bank: cheaper than the rows of these tokens
        z_TR = z_TR.where(~(z_TR <= own(knee_SR)), own(floor_SR).to(z_TR.dtype))  # NaN stays
    put(measured_TR, z_TR)

    # (2) and (3) with both bounds as one: rounding is monotone, so ±|a|·limit clips a·e where ±limit clips e.
    setpoint_TR, strength_TR = take(setpoint_TR), take(strength_TR)
    avail_T1 = (take(budget_T) - take(spent_T)).clamp_min_(0).unsqueeze_(1)
    bound_TR = take(cap_TR).minimum(avail_T1).mul(size_T1).div_(norm).minimum(strength_TR.abs().mul_(limit))
    if relative_SR.any():
        setpoint_TR = torch.where(own(relative_SR) != 0, setpoint_TR * size_T1, setpoint_TR)
    wanted_TR = (setpoint_TR - z_TR).mul_(strength_TR)
    spend_TR = wanted_TR.clamp(-bound_TR, bound_TR)
    bites_TR = spend_TR != wanted_TR
    active_TR = torch.logical_and(strength_TR, norm)
    if not (is_whole := bool(active_TR.all())):
        spend_TR = spend_TR.where(active_TR, 0.0)
        bites_TR &= active_TR

    # (4)
    u_TE = (spend_TR.unsqueeze(2) * gain).sum(1)
    rho_T1 = _norm(u_TE).div_(size_T1)
    over_T1 = rho_T1 > avail_T1
    if over_T1.any():
        u_TE *= (avail_T1 / rho_T1).where(over_T1, 1.0)
        rho_T1 = rho_T1.minimum(avail_T1)

    # (5)
    if is_whole and rows is None:
        y_TE += u_TE
    else:
        acts_T1 = active_TR.any(1, keepdim=True)
        y = take(y_TE)
        put(y_TE, (y + u_TE).to(y.dtype).where(acts_T1, y))
        rho_T1 = rho_T1.where(acts_T1, 0.0)
    for total in (spent_T, effort_T):
        add(total, rho_T1.squeeze(1))
    bites_TR |= over_T1
    if bites_TR.any():
        put(saturated_T, take(saturated_T) | bites_TR.any(1))


def _norm(rows_TE: Tensor) -> Tensor:
    """‖row‖ (T, 1). Squares in the working precision: an overflow must be seen."""
    return torch.linalg.vector_norm(rows_TE, dim=-1, keepdim=True)


def check_shapes(bank: tuple[Tensor, ...], tokens: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless every tensor fits: a kernel would read past its end, and torch would broadcast.

    bank is probe, gain, norm, limit, knee, floor, relative; tokens are the other arguments of `feedback_` in order.
    """
    probe, gain, norm, *others = (each.shape for each in bank)
    y, x, slot, setpoint, strength, cap, budget, spent, measured, effort, saturated = (each.shape for each in tokens)
    if probe != (*norm, x[1]) or gain != (*norm, y[1]) or set(others) != {norm} or not norm[1]:
        raise ValueError(
            f"the bank must be probe (S, R, {x[1]}), gain (S, R, {y[1]}), norm, limit, knee, floor and "
            f"relative (S, R) with R ≥ 1, got {', '.join(str(tuple(each.shape)) for each in bank)}"
        )
    if not (setpoint == strength == cap == measured == (slot[0], norm[1])):
        raise ValueError(
            f"setpoint, strength, cap and measured must be (T, R) = ({slot[0]}, {norm[1]}), got {tuple(setpoint)}, "
            f"{tuple(strength)}, {tuple(cap)} and {tuple(measured)}"
        )
    if not (y[0] == x[0] == slot[0] and slot == budget == spent == effort == saturated):
        raise ValueError(
            f"y, x, slot, budget, spent, effort and saturated must have one row a token, got {y[0]}, {x[0]}, "
            f"{tuple(slot)}, {tuple(budget)}, {tuple(spent)}, {tuple(effort)} and {tuple(saturated)}"
        )


def check_dense(rows: Mapping[str, Tensor]) -> None:
    """Raise ValueError, by name, unless the elements of every row lie side by side, as the kernels read them."""
    for name, each in rows.items():
        if each.stride(-1) != 1 and each.shape[-1] > 1 and each.numel():
            raise ValueError(f"{name}: rows must be contiguous, their stride is {each.stride(-1)}; call .contiguous()")


def _on_cpu(y_TE: Tensor, x_TD: Tensor, slot_T: Tensor, probe_SRD: Tensor, gain_SRE: Tensor, *others: Tensor) -> None:
    """The compiled function, found at the first use: importing numba takes time. `reference` where it serves not."""
    from kernels._cpu import law

    run = law(slot_T, probe_SRD.to(others[0].dtype), gain_SRE.to(others[0].dtype), *others)
    if run is None or not run(y_TE, x_TD):
        reference(y_TE, x_TD, slot_T, probe_SRD, gain_SRE, *others)


def _on_gpu(*arguments: Tensor) -> None:
    """The Triton kernel, found at the first use: Triton is a package for Linux only."""
    from kernels._launch import launch

    launch(*arguments)


_feedback = define(
    "feedback_(Tensor(a!) y_TE, Tensor x_TD, Tensor slot_T, Tensor probe_SRD, Tensor gain_SRE, Tensor norm_SR, "
    "Tensor limit_SR, Tensor knee_SR, Tensor floor_SR, Tensor relative_SR, Tensor setpoint_TR, Tensor strength_TR, "
    "Tensor cap_TR, Tensor budget_T, Tensor(b!) spent_T, Tensor(c!) measured_TR, Tensor(d!) effort_T, "
    "Tensor(e!) saturated_T) -> ()",
    _on_cpu,
    _on_gpu,
)
