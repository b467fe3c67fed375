"""Two processes that share a model give what one gives: tokens, log-probabilities and receipts, whatever steers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from steering.edit import Acting, Mask
from steering.errors import DimensionMismatch, PlantError, SpecError
from steering.fit import fit_concept
from steering.plant.loading import Dtype
from steering.plant.plant import Plant
from steering.plant.shared import SharedPlant, lead_load
from steering.plant.team import Crew, Group
from steering.program import Guard, Program, Scope, Term, Window
from steering.runtime import Engine, EngineSettings, Event, Finished, Request, Sampling
from steering.types import Route, Site, across, at, edit_at
from tests.plants import prompts, tiny, tiny_tokenizer
from tests.runtime.naive import across_program, greedy, law, run
from tests.runtime.parallel.conftest import needs_accelerate
from tests.runtime.test_conditions import behind, gate
from tests.runtime.test_edits import EVERYWHERE, mask, program, sparse, turn
from tests.tolerances import RUNTIME

pytestmark = needs_accelerate

PROMPTS = [tuple(prompt) for prompt in prompts(5)]
SHARED = ("llama", "qwen3", "gemma2", "phi3", "olmo2", "gpt_neox", "mixtral")
"""One family of each kind of plan: plain, with norms of q and k, with post-norms and soft caps, fused linear maps,
norms over all heads, biases, experts. Where q, k and v are put together by the model itself, its heads are not cut."""
Team = tuple[Crew, Group]
Pair = tuple[Plant, SharedPlant]
Pairs = Callable[[str], Pair]


@pytest.fixture(scope="module")
def pair_of(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """A family's tiny model in one process, and shared by two."""
    made: dict[str, Pair] = {}

    def pair(family: str) -> Pair:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny(family).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[family] = Plant.load(folder), lead_load(*team, str(folder))
        return made[family]

    return pair


def engine(plant: Plant, **settings: Any) -> Engine:
    return Engine(plant, EngineSettings(**{"max_batch": 16, "max_model_len": 96, "kv_tokens": 2048} | settings))


def numbers(value: object, at: str = "") -> dict[str, float]:
    """The numbers of a JSON document, by path."""
    if isinstance(value, dict):
        return {k: v for name, one in value.items() for k, v in numbers(one, f"{at}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, one in enumerate(value) for k, v in numbers(one, f"{at}[{i}]").items()}
    return {at: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def assert_alike(one: list[Finished], two: list[Finished]) -> None:
    """Equal tokens; log-probabilities, traces and receipts but for the order of sums."""
    for a, b in zip(one, two, strict=True):
        assert b.error is None, b.error
        assert (a.tokens, a.reason, a.text) == (b.tokens, b.reason, b.text)
        logprobs = [[p.logprob for p in done.logprobs or ()] for done in (a, b)]
        assert logprobs[1] == pytest.approx(logprobs[0], abs=RUNTIME["logprob"])
        assert (a.receipt is None) == (b.receipt is None)
        if a.receipt is not None and b.receipt is not None:
            assert numbers(b.receipt.to_json()) == pytest.approx(numbers(a.receipt.to_json()), **RUNTIME["receipt"])


def assert_same(pair: Pair, requests: list[Request], **settings: Any) -> list[Finished]:
    one, two = (run(engine(plant, **settings), requests) for plant in pair)
    assert_alike(one, two)
    return two


def requests(programs: list[Program], n: int = 8, **fields: Any) -> list[Request]:
    return [
        Request(str(i), PROMPTS[i % len(PROMPTS)], greedy(n, logprobs=0), one, **fields)
        for i, one in enumerate(programs)
    ]


@pytest.mark.parametrize("family", SHARED)
def test_every_site_of_every_kind_of_plan(pair_of: Pairs, family: str) -> None:
    plant, shared = pair_of(family)
    assert shared.fingerprint == plant.fingerprint
    assert (shared.massive, shared.heads, shared.vocab) == (plant.massive, plant.heads, plant.vocab)
    taps = ["resid_pre", "attn_in", "attn_act", "attn_out", "mlp_in", "mlp_out", "resid_post"]
    taps += ["mlp_act"] if plant.layout.mlp_act else []
    taps += list(plant.layout.outputs)
    programs = [Program(), across_program(3), Program((Term("f", "add", {at("final"): law(4)}, EVERYWHERE),))]
    for n, name in enumerate(taps):
        width = plant.width_of(Site(name, 1))  # type: ignore[arg-type]
        assert shared.width_of(Site(name, 1)) == width  # type: ignore[arg-type]
        forms: list[Acting] = [mask(width, n), turn(width, n), sparse(width, n, count=width // 2)]
        acting = {edit_at(forms[n % 3].form, name, 1): forms[n % 3], at(name, 2): law(n, read=width, write=width)}  # type: ignore[arg-type]
        programs.append(program(acting))
    done = assert_same((plant, shared), requests(programs))
    assert len({one.tokens[:3] for one in done}) > 3  # they do steer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_numbers_run_and_leave_the_fingerprint_alone(pair_of: Pairs, team: Team, dtype: Dtype) -> None:
    plant, _ = pair_of("llama")
    shared = lead_load(*team, plant.name, dtype=dtype)
    assert (shared.fingerprint, str(shared.dtype)) == (plant.fingerprint, f"torch.{dtype}")
    width = plant.width_of(Site("mlp_act", 1))
    turned = program({edit_at("turn", "mlp_act", 1): turn(width, 1)})
    plain, steered = run(engine(shared), requests([Program(), turned], 4))
    assert plain.error is None
    assert steered.receipt is not None
    assert steered.receipt.effort["mean"] > 0.1


def test_neurons_and_heads_have_the_numbers_of_the_whole_model(pair_of: Pairs) -> None:
    pair = pair_of("llama")
    plant = pair[0]
    wide = plant.width_of(Site("mlp_act", 0))
    border = wide // 2

    def without(tap: str, width: int, *gone: int) -> Program:
        scale = torch.ones(width)
        scale[list(gone)] = 0.0
        return program({edit_at("mask", tap, layer): Mask.of(scale) for layer in range(3)})  # type: ignore[arg-type]

    heads = plant.heads
    last = range((heads.count - 1) * heads.width, heads.count * heads.width)
    programs = [
        without("mlp_act", wide, border - 1),
        without("mlp_act", wide, border),
        without("mlp_act", wide, *range(border - 4, border + 4)),
        without("mlp_act", wide, *range(border, wide)),
        without("attn_act", heads.count * heads.width, *last),
        without("attn_act", heads.count * heads.width, *range(heads.width)),
    ]
    done = assert_same(pair, requests(programs, 10))
    assert len({one.tokens for one in done}) > 1


def test_laws_that_read_one_site_and_write_another_across_the_cut(pair_of: Pairs) -> None:
    pair = pair_of("llama")
    wide = pair[0].width_of(Site("mlp_act", 1))
    into = Route(Site("resid_pre", 1), Site("mlp_act", 1))
    out = Route(Site("mlp_act", 1), Site("resid_post", 1))
    laws: dict[Route, Acting] = {into: law(1, write=wide), out: law(2, read=wide)}
    term = Term("c", "lqr", laws, EVERYWHERE, target=1.0, gauges=dict.fromkeys(laws, (0.5, 2.0)))
    assert_same(pair, requests([Program((term,)), Program(), Program((term,), Guard(max_effort=0.2))]))


def test_gates_scopes_chunks_twins_and_traces(pair_of: Pairs) -> None:
    pair = pair_of("llama")
    near = replace(across_program(4, scope=EVERYWHERE), guard=Guard(max_kl=0.05))
    programs = [
        behind(gate(1, 0.1), across_program(1, scope=Scope("all"))),
        behind(gate(2, 0.0, on="prompt"), across_program(2, layers=(0, 1, 2))),
        near,
        across_program(5, scope=Scope("last", Window((1, 4)))),
        Program(),
    ]
    done = assert_same(pair, requests(programs, 8, trace=True), max_step_tokens=7)
    for one in done:
        assert one.trace is not None


def test_sampling_and_a_prefix_that_is_shared(pair_of: Pairs) -> None:
    pair = pair_of("llama")
    long = tuple(range(3, 60))
    sampling = Sampling(max_tokens=8, temperature=1.0, top_p=0.9, seed=3, logprobs=0, presence_penalty=0.3)
    engines = [engine(plant) for plant in pair]
    for n in range(2):
        asked = [Request(f"{n}{i}", long, sampling, one) for i, one in enumerate((Program(), across_program(1)))]
        one, two = (run(each, asked) for each in engines)
        assert_alike(one, two)
    assert two[0].usage.cached == 48


def test_programs_come_and_go(pair_of: Pairs) -> None:
    pair = pair_of("llama")
    engines = [engine(plant, program_slots=2) for plant in pair]
    for n in range(3):
        asked = [replace(one, id=f"{n}.{one.id}") for one in requests([across_program(n + i) for i in range(4)], 4)]
        one, two = (run(each, asked) for each in engines)
        assert_alike(one, two)


def test_an_abort_and_a_blow_up_leave_the_neighbours_alone(pair_of: Pairs) -> None:
    _, shared = pair_of("llama")
    each = engine(shared)
    wild = Program((Term("w", "add", {across(1): law(1, size=1e38)}, EVERYWHERE),))
    (alone,) = run(each, requests([across_program(2)], 12))
    ended: dict[str, Finished] = {}

    def deliver(event: Event) -> None:
        if isinstance(event, Finished):
            ended[event.request_id] = event

    for request in requests([across_program(2), Program(), wild], 12):
        each.submit(request, deliver)
    each.step()
    each.step()
    each.abort("1")
    while len(ended) < 3:
        each.step()
    assert ended["0"].tokens == alone.tokens
    assert ended["1"].reason == "abort"
    assert ended["2"].error is not None
    assert ended["2"].error.code == "nonfinite"
    (again,) = run(each, [replace(one, id="again") for one in requests([across_program(2)], 12)])
    assert again.tokens == alone.tokens


def test_what_only_one_process_can_do_is_refused(pair_of: Pairs) -> None:
    _, shared = pair_of("llama")
    each = engine(shared)
    wrong = program({at("mlp_act", 1): law(1)})
    with pytest.raises(DimensionMismatch):
        each.submit(Request("w", PROMPTS[0], greedy(1), wrong), lambda event: None)
    for setting in ("compile", "graphs", "pipeline"):
        with pytest.raises(SpecError, match=setting):
            engine(shared, **{setting: True})
    for refused in (shared.shell, lambda: shared.linears_at(Site("mlp_act", 1))):
        with pytest.raises(PlantError, match="one process has it whole"):
            refused()
    with pytest.raises(PlantError, match="one process has it whole"):
        fit_concept(shared, "tone", ["a cat", "a dog"] * 4, ["the cat", "the dog"] * 4)
    (done,) = run(each, requests([Program()]))  # nothing of this has put the two out of step
    assert done.reason == "length"


def test_an_error_that_both_meet_ends_one_request(pair_of: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails in all processes alike is repeated request by request, and they are still in step."""
    plant, shared = pair_of("llama")
    each = engine(shared)
    laid = each._runner.forward

    def forward(where: Any, frame: Any, keep: Any, drawn_T: Any = None) -> Any:
        if where.layout_3T.shape[1] == len(PROMPTS[0]):
            where = where._replace(layout_3T=where.layout_3T + 10**6)  # tokens that no embedding has
        return laid(where, frame, keep, drawn_T)

    monkeypatch.setattr(each._runner, "forward", forward)
    bad = Request("bad", PROMPTS[0], greedy(4))
    (done,) = run(each, [bad])
    assert done.error is not None
    fine = [Request("fine", PROMPTS[1], greedy(4))]
    assert [d.tokens for d in run(each, fine)] == [d.tokens for d in run(engine(plant), fine)]


def test_receipts_say_what_json_can_carry(pair_of: Pairs) -> None:
    _, shared = pair_of("llama")
    (done,) = run(engine(shared), requests([across_program(1)]))
    assert done.receipt is not None
    json.dumps(done.receipt.to_json(), allow_nan=False)
