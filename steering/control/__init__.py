"""Optimal control on tensors: gains, setpoints, effort, analysis. Knows nothing of models, kernels or requests."""

from __future__ import annotations

from steering.control.analysis import (
    Trajectory,
    closed_loop,
    identity_gains,
    scalar_gains,
    simulate,
    spectral_radius,
    transition,
)
from steering.control.effort import Spending, project, spend
from steering.control.output_lqr import OutputRegulator, output_regulate
from steering.control.riccati import Cost, Regulator, Weights, regulate, regulate_along, riccati
from steering.control.setpoint import Schedule, setpoints

__all__ = [
    "Cost",
    "OutputRegulator",
    "Regulator",
    "Schedule",
    "Spending",
    "Trajectory",
    "Weights",
    "closed_loop",
    "identity_gains",
    "output_regulate",
    "project",
    "regulate",
    "regulate_along",
    "riccati",
    "scalar_gains",
    "setpoints",
    "simulate",
    "spectral_radius",
    "spend",
    "transition",
]
