"""The fingerprint follows the function of a checkpoint, not the format that serves it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from steering.plant import fingerprint as module
from steering.plant.fingerprint import fingerprint
from tests.plants import FAMILIES, tiny


def test_families_and_weights_differ() -> None:
    prints = [fingerprint(tiny(family)) for family in FAMILIES] + [fingerprint(tiny(seed=1))]
    assert len(set(prints)) == len(FAMILIES) + 1
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in prints)


def test_does_not_depend_on_how_the_model_is_served() -> None:
    model = tiny()
    expected = fingerprint(model)
    model.config.dtype = "bfloat16"
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    model.config.transformers_version = "5.99"
    model.generation_config.temperature = 0.3
    model.set_attn_implementation("eager")
    assert fingerprint(model) == expected
    assert fingerprint(model.to(torch.bfloat16)) == expected
    assert fingerprint(model.to(torch.float64)) == expected


@pytest.mark.parametrize("whole", [True, False])
def test_depends_on_every_matrix(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not whole:  # sampled as a large model is: 4 runs of 8 values of every tensor beyond 32
        monkeypatch.setattr(module, "WHOLE_MODEL", 0)
        monkeypatch.setattr(module, "RUNS", 4)
        monkeypatch.setattr(module, "RUN", 8)
    model = tiny(layers=1)
    expected = fingerprint(model)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        if whole:
            parameter.view(-1)[-1] += 0.1
        else:
            parameter.add_(0.1)
        assert fingerprint(model) != expected, name
        parameter.copy_(kept)
    assert fingerprint(model) == expected


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "rms_norm_eps", 1e-3),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 5.0}),
        ("gemma2", "attn_logit_softcapping", 30.0),
        ("gemma2", "sliding_window", 4),
        ("gpt_neox", "use_parallel_residual", False),
        ("gpt2", "activation_function", "relu"),
    ],
)
def test_depends_on_settings_that_change_the_function(family: str, setting: str, value: object) -> None:
    model = tiny(family, layers=1)
    expected = fingerprint(model)
    setattr(model.config, setting, value)
    assert fingerprint(model) != expected


@pytest.mark.parametrize("family", FAMILIES)
def test_survives_saving(family: str, tmp_path: Path) -> None:
    model = tiny(family, layers=2)
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == fingerprint(model)
