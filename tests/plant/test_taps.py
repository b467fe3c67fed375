"""A tap sees and changes the tensor its name says, in every family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from steering.errors import PlantError
from steering.plant.layouts import blocks_of, layout_of
from steering.plant.taps import site_width, tap
from steering.types import Site, Tap
from tests.plants import FAMILIES, WIDTH, prompts, tiny

IDS = torch.tensor([prompts(1)[0], prompts(1, seed=2)[0]])
INNER = 48


def record(model: PreTrainedModel, *sites: Site) -> dict[Site, Tensor]:
    """What the taps of `sites` see during one forward pass."""
    seen: dict[Site, Tensor] = {}

    def see(site: Site) -> Callable[[Tensor], None]:
        return lambda x: seen.__setitem__(site, x.clone())

    handles = [tap(model, layout_of(model), site, see(site)) for site in sites]
    model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def test_one_blocks_output_is_the_next_ones_input(model: PreTrainedModel) -> None:
    seen = record(model, Site("resid_post", 0), Site("resid_pre", 1), Site("resid_pre", 0))
    assert torch.equal(seen[Site("resid_post", 0)], seen[Site("resid_pre", 1)])
    assert not torch.allclose(seen[Site("resid_pre", 0)], seen[Site("resid_pre", 1)], atol=0.1)


def test_the_first_input_is_the_embedding(model: PreTrainedModel) -> None:
    seen = record(model, Site("resid_pre", 0))[Site("resid_pre", 0)]
    embedded = model.get_input_embeddings()(IDS)
    if model.config.model_type == "gpt2":
        embedded = embedded + model.transformer.wpe.weight[: IDS.shape[1]]
    assert torch.equal(seen, embedded)


def test_final_is_what_the_head_reads(model: PreTrainedModel) -> None:
    last = Site("resid_post", 2)
    seen = record(model, Site("final", 0), last)
    logits = model.get_output_embeddings()(seen[Site("final", 0)])
    if cap := getattr(model.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    assert torch.equal(logits, model(IDS, use_cache=False).logits)
    norm = model.get_submodule(layout_of(model).final)
    assert torch.equal(norm(seen[last]), seen[Site("final", 0)])


@pytest.mark.parametrize("in_place", [True, False])
def test_what_is_written_at_an_output_arrives_at_the_next_input(model: PreTrainedModel, in_place: bool) -> None:
    shift = torch.linspace(-1, 1, WIDTH)
    before = record(model, Site("resid_pre", 1))[Site("resid_pre", 1)]

    def write(x: Tensor) -> Tensor | None:
        if not in_place:
            return x + shift
        x.add_(shift)
        return None

    handle = tap(model, layout_of(model), Site("resid_post", 0), write)
    after = record(model, Site("resid_pre", 1))[Site("resid_pre", 1)]
    handle.remove()
    assert torch.equal(after, before + shift)
    assert torch.equal(record(model, Site("resid_pre", 1))[Site("resid_pre", 1)], before)


@pytest.mark.parametrize("name", ["resid_pre", "resid_post", "attn_in", "attn_out", "mlp_act", "mlp_out", "final"])
def test_every_tap_can_replace_its_tensor(model: PreTrainedModel, name: Tap) -> None:
    site = Site(name, 0)
    if model.config.model_type == "mixtral" and name == "mlp_act":
        pytest.skip("no single MLP activation")
    before = model(IDS, use_cache=False).logits
    handle = tap(model, layout_of(model), site, torch.neg)  # a post-norm undoes a scale, not a sign
    after = model(IDS, use_cache=False).logits
    handle.remove()
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(model(IDS, use_cache=False).logits, before)


def test_a_block_without_its_branches_is_the_identity(model: PreTrainedModel) -> None:
    layout = layout_of(model)
    handles = [tap(model, layout, Site(name, 1), torch.zeros_like) for name in ("attn_out", "mlp_out")]
    seen = record(model, Site("resid_pre", 1), Site("resid_post", 1))
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[Site("resid_pre", 1)], seen[Site("resid_post", 1)])


def test_attention_input_comes_after_its_norm(model: PreTrainedModel) -> None:
    seen = record(model, Site("resid_pre", 1), Site("attn_in", 1))
    block = blocks_of(model, layout_of(model))[1]
    norms = [getattr(block, name) for name in ("input_layernorm", "ln_1") if hasattr(block, name)]
    expected = norms[0](seen[Site("resid_pre", 1)]) if norms else seen[Site("resid_pre", 1)]
    assert bool(norms) == (model.config.model_type != "olmo2")
    assert torch.equal(seen[Site("attn_in", 1)], expected)


def test_mlp_activation_is_what_the_last_linear_reads(model: PreTrainedModel) -> None:
    layout = layout_of(model)
    if layout.mlp_act is None:
        with pytest.raises(PlantError, match="mixes experts"):
            tap(model, layout, Site("mlp_act", 0), lambda x: None)
        return
    seen = record(model, Site("mlp_act", 1), Site("mlp_out", 1))
    assert seen[Site("mlp_act", 1)].shape[-1] == site_width(model, layout, Site("mlp_act", 1)) == INNER
    down = blocks_of(model, layout)[1].get_submodule(layout.mlp_act)
    assert torch.equal(down(seen[Site("mlp_act", 1)]), seen[Site("mlp_out", 1)])
    assert site_width(model, layout, Site("mlp_out", 1)) == WIDTH


def test_taps_of_one_site_run_in_the_order_of_their_installation(model: PreTrainedModel) -> None:
    layout = layout_of(model)
    handles = [tap(model, layout, Site("resid_post", 0), lambda x, n=n: x * 2 + n) for n in (1.0, 0.0)]
    twice = record(model, Site("resid_pre", 1))[Site("resid_pre", 1)]
    for handle in handles:
        handle.remove()
    once = record(model, Site("resid_pre", 1))[Site("resid_pre", 1)]
    assert torch.equal(twice, (once * 2 + 1) * 2)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("resid_pre", 3), "no layer 3: expected 0 to 2"),
        (Site("resid_pre", -1), "no layer -1"),
        (Site("final", 1), "no layer 1: expected 0 to 0"),
        (Site("logits", 0), "'logits' does not exist: expected one of resid_pre"),  # type: ignore[arg-type]
    ],
)
def test_sites_that_do_not_exist_are_refused(site: Site, message: str) -> None:
    model = tiny("llama")
    with pytest.raises(PlantError, match=message):
        tap(model, layout_of(model), site, lambda x: None)
