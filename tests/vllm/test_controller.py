"""One worker's steering, without vLLM: the same on every rank, handed over once, and never of a copy nobody reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steering.program import Program, Scope, Term
from steering.types import across
from steering.vllm.account import Accounts
from steering.vllm.attachment import KEY, Attachment
from steering.vllm.controller import Controller, Ranks
from steering.vllm.salt import check_compiled
from steering.vllm.sites import Sites
from tests.plants import WIDTH, tiny
from tests.runtime.naive import law

N_PROMPT = 4
LAYERS = 6


def made(rank: int = 0) -> tuple[Any, Controller]:
    model = tiny("llama", layers=LAYERS)
    sites = Sites(model, "llama", WIDTH, 1)
    return model, Controller(sites, Ranks(rank, 1, lambda part: part), 4, torch.device("cpu"), is_compiled=False)


def begun(controller: Controller) -> Program:
    """A step over the prompt of one steered request, ready to run."""
    own = Program((Term("t", "test", {across(n): law(n) for n in range(LAYERS)}, Scope("all", "all")),))
    params = SimpleNamespace(extra_args={KEY: Attachment.of("r", own, N_PROMPT).to_args()})
    check_compiled(SimpleNamespace(sampling_params=params))
    controller.begin([], [SimpleNamespace(req_id="r-0", prompt_token_ids=[5] * N_PROMPT, sampling_params=params)])
    controller.forward([("r-0", 0, N_PROMPT)])
    return own


def stepped(model: Any, controller: Controller) -> Program:
    own = begun(controller)
    with controller.running(), torch.no_grad():
        hidden = model.model(torch.tensor([[5] * N_PROMPT])).last_hidden_state[0]
    controller.end(hidden)
    return own


def test_rank_0_hands_over_what_was_measured_and_the_others_keep_nothing() -> None:
    model, controller = made()
    own, accounts = stepped(model, controller), Accounts()
    tally = accounts.open("r", own, N_PROMPT)
    accounts.file(controller.take())
    assert accounts.settle("r", N_PROMPT).error is None
    assert tally.tokens == N_PROMPT
    model, other = made(rank=1)
    stepped(model, other)
    other.outbox.lose("r", 2)
    assert other.take() == b""
    assert other.outbox.take() == b"", "nobody else takes it"


def test_hooks_come_in_an_order_that_every_rank_has() -> None:
    model, controller = made()
    stepped(model, controller)
    sites = [site for place in controller.places.values() for site in place.sites if site.tap == "resid_post"]
    assert len(sites) >= LAYERS - 1
    assert sites == sorted(sites), "those of one module gather one after another, and must meet"


def test_a_model_that_passes_a_hook_by_fails_the_step() -> None:
    _, controller = made()
    begun(controller)
    with pytest.raises(Exception, match="did not come past resid_post"):
        controller.end(torch.zeros(N_PROMPT, WIDTH))


def test_a_state_that_cannot_be_steered_in_place_is_an_error() -> None:
    _, controller = made()
    begun(controller)
    apart = torch.zeros(WIDTH, 2, N_PROMPT // 2).permute(2, 1, 0)
    with pytest.raises(RuntimeError, match="view"):
        controller.whole(apart, next(iter(controller.places)))
