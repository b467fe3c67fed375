"""The vocabulary: where a law reads, where it writes, and the legend of dimensions.

Legend, used in names throughout: L layers · T tokens of a packed batch · D width of the read site (of the residual
stream unless said otherwise) · E width of the write site · R rank (channels) · S program slots · V vocabulary ·
B requests · N examples · K rows of a batch of vectors.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Tap = Literal["resid_pre", "resid_post", "attn_in", "attn_out", "mlp_act", "mlp_out", "final"]
"""`resid_pre` block input · `resid_post` block output · `attn_in` input of the attention (after its norm) · `attn_out`
its output, before it joins the residual · `mlp_act` input of the MLP's last linear map · `mlp_out` the MLP's output ·
`final` output of the final norm, what the head reads."""

TAPS: tuple[Tap, ...] = get_args(Tap)

Units = Literal["centred", "contrast", "absolute"]
"""How a setpoint λ becomes β_l: `centred` v·μ₋ + λ‖E_l‖ · `contrast` λ‖E_l‖ · `absolute` λ."""

Gains = Literal["dense", "matrix_free", "identity"]
"""Which gain a concept carries: the published Riccati (Q = qI), output-LQR by products (Q = q v vᵀ), or A = I."""


class Site(NamedTuple):
    """One tensor of the running model: a tap of a layer. `final` has layer 0 by convention."""

    tap: Tap
    layer: int

    def __str__(self) -> str:
        return self.tap if self.tap == "final" else f"{self.tap}.{self.layer}"


class Route(NamedTuple):
    """Where a law reads and where it writes. A-LQR reads a block's input and writes its output."""

    read: Site
    write: Site

    def __str__(self) -> str:
        return f"{self.read}->{self.write}"


def across(layer: int) -> Route:
    """The route of A-LQR: error at the block's input, control at its output (B = I)."""
    return Route(Site("resid_pre", layer), Site("resid_post", layer))


def at(tap: Tap, layer: int = 0) -> Route:
    """A route that reads and writes the same site."""
    return Route(Site(tap, layer), Site(tap, layer))
