"""Every family of the table is recognised; anything else is refused with the list of what is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from steering.errors import PlantError
from steering.plant.layouts import LAYOUTS, Layout, blocks_of, layout_of
from tests.plants import FAMILIES, tiny


def test_the_table_lists_the_families_that_are_tested() -> None:
    assert set(LAYOUTS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_lead_to_modules(family: str) -> None:
    model = tiny(family, layers=2)
    layout = layout_of(model)
    assert layout is LAYOUTS[family]
    assert len(blocks_of(model, layout)) == 2


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    stranger = nn.Module()
    stranger.config = SimpleNamespace(model_type="bert")  # type: ignore[assignment]
    with pytest.raises(PlantError, match=r"'bert' is not supported: expected one of gemma2, .*qwen3"):
        layout_of(stranger)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(PlantError, match="expected a causal language model"):
        layout_of(tiny("llama", layers=1).base_model)


def test_a_path_that_is_no_list_of_blocks_is_refused() -> None:
    with pytest.raises(AttributeError, match="not a list of blocks"):
        blocks_of(tiny("llama", layers=1), Layout(blocks="model.norm"))
