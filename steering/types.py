"""The vocabulary: where a law reads, where it writes, and the legend of dimensions.

Legend, used in names throughout: L layers · T tokens of a packed batch · D width of the read site (of the residual
stream unless said otherwise) · E width of the write site · R rank (channels) · S program slots · V vocabulary ·
B requests · N examples · K rows of a batch of vectors · M edits of one form on one route.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

Tap = Literal[
    "resid_pre", "resid_post", "attn_in", "attn_act", "attn_out", "mlp_in", "mlp_act", "mlp_out", "final",
    "q_out", "k_out", "v_out", "gate_out", "up_out",
]  # fmt: skip
"""`resid_pre` block input · `resid_post` block output · `attn_in` input of the attention (after its norm) · `attn_act`
input of its last linear map, the heads' outputs side by side · `attn_out` its output, before it joins the residual ·
`mlp_in` input of the MLP · `mlp_act` input of its last linear map · `mlp_out` its output · `final` output of the final
norm, what the head reads · `q_out` … `up_out` outputs of single linear maps, in the families that have them apart."""

TAPS: tuple[Tap, ...] = get_args(Tap)

Units = Literal["centred", "contrast", "absolute"]
"""How a setpoint λ becomes β_l: `centred` v·μ₋ + λ‖E_l‖ · `contrast` λ‖E_l‖ · `absolute` λ."""

Reported = Units | Literal["fraction", "degrees"]
"""Units of what a receipt reports: those of a setpoint, the share of a site's coordinates, or an angle."""

Gains = Literal["dense", "matrix_free", "identity"]
"""Which gain a concept carries: the published Riccati (Q = qI), output-LQR by products (Q = q v vᵀ), or A = I."""


class Site(NamedTuple):
    """One tensor of the running model: a tap of a layer. `final` has layer 0 by convention."""

    tap: Tap
    layer: int

    def __str__(self) -> str:
        return self.tap if self.tap == "final" else f"{self.tap}.{self.layer}"


Form = Literal["law", "mask", "turn", "sparse"]
"""What acts on a route: the law of `steering.law`, or an edit of `steering.edit`."""


class Route(NamedTuple):
    """Where something reads and writes, and in what form. A-LQR reads a block's input and writes its output; edits
    read the site that they write."""

    read: Site
    write: Site
    form: Form = "law"

    def __str__(self) -> str:
        return f"{self.read}->{self.write}" + ("" if self.form == "law" else f" ({self.form})")


def across(layer: int) -> Route:
    """The route of A-LQR: error at the block's input, control at its output (B = I)."""
    return Route(Site("resid_pre", layer), Site("resid_post", layer))


def at(tap: Tap, layer: int = 0) -> Route:
    """A law's route that reads and writes the same site."""
    return Route(Site(tap, layer), Site(tap, layer))


def edit_at(form: Form, tap: Tap, layer: int = 0) -> Route:
    """The route of an edit of this form at a site."""
    return Route(Site(tap, layer), Site(tap, layer), form)
