"""The norms of the engine's tree: found by what they compute, replaced in it alone, and laws that run within them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernels.norm import Form
from steering.edit import Mask
from steering.plant.plant import Plant
from steering.program import Program, Scope, Term
from steering.runtime import Engine, Finished, Request, norms, runner
from steering.runtime.norms import Norms, norm_of
from steering.types import Route, Site, across, at, edit_at
from tests.kernels.cases import same_bits
from tests.plants import FAMILIES, WIDTH, prompts, tiny
from tests.runtime.naive import across_program, greedy, law, run
from tests.runtime.test_conditions import behind, gate
from tests.runtime.test_engine import LLAMA, PROMPTS, engine
from tests.tolerances import PLANT

FORMS: dict[str, Form] = {
    "gemma2": "rms_plus_one",
    "gemma3_text": "rms_plus_one",
    "olmo2": "rms_wide",
    "gpt2": "layer",
    "gpt_neox": "layer",
}
"""The families' forms; the others have "rms"."""


def norms_in(shell: nn.Module) -> list[nn.Module]:
    return [module for name, module in shell.named_modules() if "norm" in name or "ln_" in name]


def logits(shell: nn.Module) -> Tensor:
    with torch.inference_mode():
        return shell(torch.tensor([prompts(1)[0]]), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_of_a_family_is_replaced_by_its_form(family: str) -> None:
    plant = Plant(tiny(family, dtype=torch.bfloat16))
    shell = plant.shell()
    found = norms_in(shell)
    forms = {norm.form for each in found if (norm := norm_of(each, torch.bfloat16, plant.device)) is not None}
    assert forms == {FORMS.get(family, "rms")}
    assert Norms(plant, shell, waits=False).replaced == set(found)
    assert len(found) >= 2 * plant.depth + 1
    assert not any("forward" in vars(module) for module in plant.model.modules())
    # Of half precision no bit differs here: the sum's other order is lost in the rounding.
    torch.testing.assert_close(logits(shell), logits(plant.model), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_norms_compute_what_the_plants_do(family: str) -> None:
    plant = Plant(tiny(family))
    shell = plant.shell()
    Norms(plant, shell, waits=True)
    torch.testing.assert_close(logits(shell), logits(plant.model), **PLANT["float32"])


class Odd(nn.Module):
    """A norm that adds ε to the root instead of to what is under it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), 1e-3

    def forward(self, y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class Gated(nn.RMSNorm):
    def forward(self, y: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(y if gate is None else y * gate)


@pytest.mark.parametrize(
    "module",
    [
        Odd(),
        Gated(WIDTH, eps=1e-6),
        nn.RMSNorm(WIDTH),
        nn.LayerNorm((2, WIDTH)),
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.BatchNorm1d(WIDTH),
        nn.GroupNorm(1, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.PReLU(WIDTH),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_is_left_alone(module: nn.Module) -> None:
    assert norm_of(module, torch.float32, torch.device("cpu")) is None


def test_what_somebody_replaced_before_is_left_alone() -> None:
    module = nn.LayerNorm(WIDTH)
    assert norm_of(module, torch.float32, torch.device("cpu")) is not None
    assert norm_of(module, torch.float64, torch.device("cpu")) is None
    module.forward = lambda y: 2 * y  # type: ignore[method-assign,assignment]
    assert norm_of(module, torch.float32, torch.device("cpu")) is None


def test_norm_without_bias_or_of_torch_is_found() -> None:
    for module, form in ((nn.LayerNorm(WIDTH, bias=False), "layer"), (nn.RMSNorm(WIDTH, eps=1e-6), "rms")):
        nn.init.normal_(module.weight)
        norm = norm_of(module, torch.float32, torch.device("cpu"))
        assert norm is not None
        assert norm.form == form


# ── laws that wait ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Engines whose laws wait, as on a GPU; lists whether each norm that a law waited for was the one."""
    seen: list[bool] = []
    monkeypatch.setattr(runner, "Norms", lambda plant, shell, waits: Norms(plant, shell, True))
    real, flush = norms.norm_, Norms.flush

    def spy(*args: object, law: tuple[Tensor, ...]) -> Tensor:
        seen.append(True)
        return real(*args, law=law)  # type: ignore[arg-type]

    def spy_flush(self: Norms) -> None:
        if self._waiting is not None:
            seen.append(False)
        flush(self)

    monkeypatch.setattr(norms, "norm_", spy)
    monkeypatch.setattr(Norms, "flush", spy_flush)
    return seen


EVERYWHERE = Scope("all", "all")
PROGRAMS = [
    across_program(1, layers=(0, 1, 2)),
    across_program(2, layers=(0, 1, 2), scope=EVERYWHERE, rank=2),
    Program(),
    Program(
        (
            Term("a", "add", {at("resid_post", 0): law(3), across(0): law(4), at("resid_post", 2): law(5)}, EVERYWHERE),
            Term("b", "add", {Route(Site("resid_post", 0), Site("resid_post", 1)): law(6)}, EVERYWHERE),
        )
    ),
    Program(
        (
            Term("c", "add", {at("resid_post", 0): law(7), at("resid_pre", 1): law(8)}, EVERYWHERE),
            Term("d", "add", {at("attn_in", 2): law(9), at("final"): law(10)}, EVERYWHERE),
        )
    ),
]


def answers(one: Engine, programs: list[Program], prefix: str = "") -> list[Finished]:
    pairs = zip(PROMPTS, programs, strict=False)
    return run(one, [Request(prefix + str(i), p, greedy(logprobs=1), g) for i, (p, g) in enumerate(pairs)])


def assert_alike(got: list[Finished], want: list[Finished]) -> None:
    """Bit for bit: the same numbers were computed in the same order."""
    for one, other in zip(got, want, strict=True):
        assert one.error is None
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs
        assert one.receipt == other.receipt


@pytest.mark.parametrize("family", FAMILIES)
def test_laws_that_wait_do_what_they_did(family: str, request: pytest.FixtureRequest) -> None:
    plant = Plant(tiny(family))
    want = answers(engine(plant, max_step_tokens=9), PROGRAMS)
    seen: list[bool] = request.getfixturevalue("fused")
    assert_alike(answers(engine(plant, max_step_tokens=9), PROGRAMS), want)
    if family == "olmo2":
        assert not seen, "an attention that reads the residual itself has no norm to wait for"
    else:
        assert True in seen
        assert False in seen, "laws of other routes must have the first one run before they do"


def test_gates_and_edits_look_at_a_state_that_is_steered(request: pytest.FixtureRequest) -> None:
    mask = edit_at("mask", "resid_pre", 1)
    masked = Term("m", "mask", {mask: Mask.of(torch.full((WIDTH,), 0.5))}, EVERYWHERE)
    programs = [
        behind(gate(1, 0.1), across_program(1, layers=(0, 1, 2), scope=EVERYWHERE)),
        behind(gate(2, 0.0, seed=9), across_program(3, layers=(0, 1, 2), scope=EVERYWHERE)),
        Program((*across_program(4, layers=(0, 2), scope=EVERYWHERE).terms, masked)),
    ]
    want = answers(engine(), programs)
    seen: list[bool] = request.getfixturevalue("fused")
    assert_alike(answers(engine(), programs), want)
    assert True in seen
    assert False in seen


def test_law_of_a_lone_layer_runs_within_the_norm(fused: list[bool]) -> None:
    answers(engine(), [across_program(1, layers=(0, 1, 2), scope=EVERYWHERE)])
    assert fused
    assert all(fused), "keeping a state to read it later must not end the wait"


def test_strength_zero_is_the_unsteered_answer_bit_for_bit(fused: list[bool]) -> None:
    idle = across_program(1, layers=(0, 1, 2), scope=EVERYWHERE, size=0.0)
    steered, plain = answers(engine(), [idle, idle]), answers(engine(), [Program(), Program()])
    assert fused
    assert [done.tokens for done in steered] == [done.tokens for done in plain]
    assert [done.logprobs for done in steered] == [done.logprobs for done in plain]


def waiting(subject: Norms) -> tuple[Tensor, list[Tensor]]:
    """A law on rows of ones that waits for the output of block 0; the calls of its own launch are listed."""
    calls: list[Tensor] = []
    one_TR, one_T, slot_T = torch.zeros(4, 1), torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    row, knob = torch.zeros(1, 1, WIDTH), torch.zeros(1, 1)
    arguments = (slot_T, row, row, *(knob,) * 5, *(one_TR,) * 3, one_T, one_T, one_TR, one_T, slot_T)
    state = torch.ones(1, 4, WIDTH)
    subject.fused(Site("resid_post", 0), lambda y, x: calls.append(y), *arguments)(state[0], state[0])
    return state, calls


def test_a_law_that_nothing_reads_is_an_error_and_not_forgotten() -> None:
    subject = Norms(LLAMA, LLAMA.shell(), waits=True)
    waiting(subject)
    with pytest.raises(RuntimeError, match="waited for a norm that did not come"):
        subject.settle()
    subject.settle()
    _, calls = waiting(subject)
    subject.drop()
    subject.settle()
    assert not calls


def test_a_norm_of_other_rows_has_the_law_run_first() -> None:
    shell = LLAMA.shell()
    subject = Norms(LLAMA, shell, waits=True)
    module = shell.get_submodule("model.norm")
    state, calls = waiting(subject)
    with torch.inference_mode():
        module(torch.ones(1, 4, WIDTH))
        assert len(calls) == 1
        assert same_bits(calls[0], state[0])
        state, calls = waiting(subject)
        module(state)
    assert not calls, "the norm that was waited for runs the law in its own launch"
    subject.settle()


def test_a_law_that_reads_more_than_it_writes_does_not_wait() -> None:
    subject = Norms(LLAMA, LLAMA.shell(), waits=True)
    wide, narrow = torch.zeros(1, 1, 2 * WIDTH), torch.zeros(1, 1, WIDTH)

    def launch(y_TE: Tensor, x_TD: Tensor) -> None:
        raise AssertionError

    def fused_with(probe: Tensor, gain: Tensor, site: Site) -> object:
        return subject.fused(site, launch, torch.zeros(1), probe, gain)

    assert fused_with(narrow, narrow, Site("resid_post", 0)) is not launch
    assert fused_with(wide, narrow, Site("resid_post", 0)) is launch
    assert fused_with(narrow, narrow, Site("resid_post", LLAMA.depth - 1)) is not launch
    assert fused_with(narrow, narrow, Site("mlp_out", 0)) is launch
