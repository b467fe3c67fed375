"""Plans: what the methods on weights, neurons and subspaces need of one model, frozen; one kind for each method."""

from __future__ import annotations

from steering.plan.act_add import ActAddPlan
from steering.plan.adapter import AdapterPlan
from steering.plan.base import MAX_RANK, ORTHONORMAL, Plan, is_orthonormal
from steering.plan.channels import ChannelsPlan
from steering.plan.eigenshift import EigenshiftPlan, Selection
from steering.plan.heads import HeadProbe, HeadsPlan
from steering.plan.interaction import InteractionPlan
from steering.plan.language import LanguagePlan
from steering.plan.layers import LayersPlan
from steering.plan.neurons import NeuronScore, NeuronSite, NeuronsPlan
from steering.plan.reft import Form, ReftPlan
from steering.plan.sae import Autoencoder, SaePlan
from steering.plan.sparsity import SparsityPlan
from steering.plan.subspace import SubspacePlan
from steering.plan.transport import TransportForm, TransportPlan, TransportSite

__all__ = [
    "MAX_RANK",
    "ORTHONORMAL",
    "PLANS",
    "ActAddPlan",
    "AdapterPlan",
    "Autoencoder",
    "ChannelsPlan",
    "EigenshiftPlan",
    "Form",
    "HeadProbe",
    "HeadsPlan",
    "InteractionPlan",
    "LanguagePlan",
    "LayersPlan",
    "NeuronScore",
    "NeuronSite",
    "NeuronsPlan",
    "Plan",
    "ReftPlan",
    "SaePlan",
    "Selection",
    "SparsityPlan",
    "SubspacePlan",
    "TransportForm",
    "TransportPlan",
    "TransportSite",
    "is_orthonormal",
]

PLANS: dict[str, type[Plan]] = {
    cls.kind: cls
    for cls in (
        EigenshiftPlan,
        SubspacePlan,
        ReftPlan,
        NeuronsPlan,
        HeadsPlan,
        ActAddPlan,
        SaePlan,
        LanguagePlan,
        TransportPlan,
        InteractionPlan,
        ChannelsPlan,
        AdapterPlan,
        SparsityPlan,
        LayersPlan,
    )
}
"""Every kind of plan by its name."""
