"""Conditions, vectors of the request and captures over HTTP: one quantity is measured, gated on and reported."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from steering import Plant, Store, encoded
from steering.concept import Concept

PROMPT = "the cat is in the sun"
GREEDY = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/generate", json={**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def steered(when: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    one = {"type": "add", "concept": "animal", "strength": 8.0, **more}
    return {"steering": {"interventions": [one | ({"when": when} if when else {})]}}


def test_trace_capture_and_condition_measure_the_same(client: httpx.Client, plant: Plant, folder: Any) -> None:
    concept = Concept.from_artifact(Store(folder).load("happy"))
    traced = client.post("/v1/steering/trace", json={"prompt": PROMPT, "concepts": ["happy"]}).json()
    at_end = traced["concepts"]["happy"]["projections"][-1][2]
    body = client.post("/v1/capture", json={"prompt": PROMPT, "sites": ["resid_pre.2"], "positions": "last"}).json()
    state = np.frombuffer(base64.b64decode(body["data"]["resid_pre.2"]["data"]), dtype="<f4").copy()
    projection = float(torch.from_numpy(state) @ concept.direction[2])
    captured = (projection - float(concept.origin[2])) / float(concept.magnitude[2])
    assert captured == pytest.approx(at_end, abs=1e-4)

    for off, met in ((-0.01, 1), (0.01, 0)):
        when = {"concept": "happy", "layer": 2, "above": at_end + off, "on": "prompt"}
        [condition] = ask(client, **steered(when))["steering"]["conditions"]
        assert (condition["asked"], condition["met"]) == (1, met)
        assert condition["mean"] == pytest.approx(at_end, abs=1e-4)
        assert condition["concept"] == "happy"


def test_a_condition_that_is_not_met_leaves_the_answer_alone(client: httpx.Client) -> None:
    plain, always = ask(client)["text"], ask(client, **steered())
    assert always["text"] != plain
    for on in ("prompt", "token"):
        when = {"concept": "happy", "layer": 1, "below": -1e6, "on": on}
        missed = ask(client, **steered(when))
        assert missed["text"] == plain
        assert missed["steering"]["tokens_steered"] == 0
        met = ask(client, **steered({"concept": "happy", "layer": 1, "above": -1e6, "on": on}, layers=[1, 2]))
        assert met["text"] == ask(client, **steered(layers=[1, 2]))["text"]


def test_a_vector_of_the_request_is_added(client: httpx.Client, plant: Plant) -> None:
    vector = encoded(torch.linspace(-8, 8, plant.width))
    one = {"type": "add", "inline": {"layer.1": vector, "layer.2": vector}}
    answer = ask(client, steering={"interventions": [one]})
    assert answer["text"] != ask(client)["text"]
    assert answer["steering"]["effort"]["max"] > 0
    zero = ask(client, steering={"interventions": [{**one, "strength": 0}]})
    assert zero["text"] == ask(client)["text"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"when": {"concept": "nobody", "layer": 1, "above": 0}}, "steering.interventions[0].when.concept"),
        ({"when": {"concept": "happy", "layer": 99, "above": 0}}, "steering.interventions[0].when.layer"),
        ({"when": {"concept": "happy", "layer": 1}}, "steering.interventions[0].when.above"),
        (
            {"when": {"concept": "happy", "layer": 1, "above": 0, "on": "sometimes"}},
            "steering.interventions[0].when.on",
        ),
        ({"when": {"concept": "happy", "layer": 1, "over": 0}}, "steering.interventions[0].when.over"),
        (
            {"concept": None, "inline": {"layer.1": {"dtype": "float32", "shape": [3], "data": ""}}},
            "steering.interventions[0].inline.layer.1.shape",
        ),
        (
            {"concept": None, "inline": {"layer.1": {"dtype": "int8", "shape": [3], "data": ""}}},
            "steering.interventions[0].inline.layer.1.dtype",
        ),
        ({"inline": {}}, "steering.interventions[0].concept"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/generate", json={**GREEDY, **steered(**change)})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_capture_gives_every_site_and_position_asked_for(client: httpx.Client, plant: Plant) -> None:
    sites = ["resid_pre.0", "resid_post.1", "attn_in.1", "attn_out.2", "mlp_act.0", "mlp_out.2", "final"]
    body = client.post("/v1/capture", json={"prompt": PROMPT, "sites": sites, "positions": [-1, 0, 2]}).json()
    n = len(client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"])
    assert body["positions"] == [n - 1, 0, 2]
    assert [token["id"] for token in body["tokens"]][1] == client.post("/tokenize", json={"prompt": PROMPT}).json()[
        "tokens"
    ][0]
    assert list(body["data"]) == sites
    for site, one in body["data"].items():
        assert one["shape"][0] == 3
        raw = np.frombuffer(base64.b64decode(one["data"]), dtype="<f4")
        assert raw.size == np.prod(one["shape"]), site
        assert np.isfinite(raw).all()
    same = [
        client.post("/v1/capture", json={"prompt": PROMPT, "sites": [s]}).json()
        for s in ("resid_post.0", "resid_pre.1")
    ]
    assert same[0]["data"]["resid_post.0"] == same[1]["data"]["resid_pre.1"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"sites": []}, "sites"),
        ({"sites": ["resid_pre"]}, "sites[0]"),
        ({"sites": ["final", "resid_pre.99"]}, "sites[1]"),
        ({"sites": ["../etc.1"]}, "sites[0]"),
        ({"positions": [99999]}, "positions[0]"),
        ({"positions": "some"}, "positions"),
        ({"prompt": None}, "prompt"),
        ({"steering": {}}, "steering"),
    ],
)
def test_a_capture_of_what_is_not_there_is_refused(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/capture", json={"prompt": PROMPT, "sites": ["final"], **change})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
