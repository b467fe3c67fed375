"""lm-evaluation-harness measures the embedded model through `local-completions`, steered or not, without knowing of it.

The harness asks for the log-probabilities of a question and a candidate answer together: token ids as the prompt,
`echo`, `logprobs: 1` and one token more, which it throws away. What it reports is the share of questions whose true
answer is the likeliest of all candidates. `harness/` holds its task; the data are those of `steering.demo.facts`, and
SETPOINT_REFRESH_GOLDENS=1 writes them anew.

Where the harness is not installed its requests are sent without it, word for word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from transformers import AutoTokenizer

from steering.demo import MODEL, MODEL_ID
from steering.demo.facts import FACTS
from tests.server.test_serve import process

FOLDER = Path(__file__).parent / "harness"
DATA = FOLDER / "facts.jsonl"
EVERY = 4
"""Every fourth question: of each category at least one."""
BATCH = 16
KNOWS = 0.8
"""What the embedded model has at least learnt; one answer in nine would be right by chance."""


def documents() -> list[dict[str, Any]]:
    """A question, the sentences that could answer it, and which of them is true."""
    return [
        {
            "question": fact.questions[0],
            "choices": [f"{said[0].upper()}{said[1:]}." for said in map(fact.statement.format, fact.pool)],
            "label": fact.pool.index(fact.answer),
        }
        for fact in FACTS[::EVERY]
    ]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the embedded model."""
    with process(SETPOINT_STORE=str(tmp_path_factory.mktemp("store"))) as running:
        assert running.stdout is not None
        yield running.stdout.readline().split()[1]


def test_the_data_are_the_embedded_models_facts() -> None:
    text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents())
    if os.environ.get("SETPOINT_REFRESH_GOLDENS"):
        DATA.write_text(text, encoding="utf-8")
    assert DATA.read_text(encoding="utf-8") == text


def test_what_the_harness_sends(address: str) -> None:
    """Its requests, and its reading of the answers: `lm_eval.models.openai_completions` of version 0.4."""
    with httpx.Client(base_url=address, timeout=60) as client:
        plain = scores(client)
        assert accuracy(plain) >= KNOWS
        spanish = {"targets": {"spanish": {"setpoint": 3.0, "apply": {"prompt": "all"}}}}
        assert client.put("/v1/steering/default", json=spanish).status_code == 201
        try:
            steered = scores(client)
        finally:
            assert client.delete("/v1/steering/default").status_code == 200
        assert accuracy(steered) <= accuracy(plain)
        # Sentences in English are less likely, the true as the false, when the model is held at Spanish.
        assert sum(map(sum, steered)) < sum(map(sum, plain)) - len(documents())


class Row(NamedTuple):
    """One candidate: the question's number, the tokens of question and answer, and how many are the question's."""

    question: int
    tokens: list[int]
    start: int


def rows() -> list[Row]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = []
    for index, document in enumerate(documents()):
        chat = [{"role": "user", "content": document["question"]}]
        context = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        start = len(tokenizer(context, add_special_tokens=False).input_ids)
        texts = (context + choice for choice in document["choices"])
        found += [Row(index, tokenizer(text, add_special_tokens=False).input_ids, start) for text in texts]
    return found


def accuracy(found: list[list[float]]) -> float:
    """The share of questions whose true answer is the likeliest."""
    pairs = zip(documents(), found, strict=True)
    return sum(document["label"] == score.index(max(score)) for document, score in pairs) / len(found)


def scores(client: httpx.Client) -> list[list[float]]:
    """The log-probability of every candidate answer, by question."""
    candidates = rows()
    found: list[list[float]] = [[] for _ in documents()]
    for first in range(0, len(candidates), BATCH):
        batch = candidates[first : first + BATCH]
        body = {
            "model": MODEL_ID,
            "prompt": [row.tokens for row in batch],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        }
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        choices = sorted(answer.json()["choices"], key=itemgetter("index"))
        for choice, row in zip(choices, batch, strict=True):
            own, top = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
            assert len(own) == len(top) == len(row.tokens) + 1
            assert own[0] is None
            assert all(max(likely.values()) >= value for value, likely in zip(own[1:], top[1:], strict=True))
            found[row.question].append(sum(own[row.start : -1]))
    return found


def test_the_harness_itself(address: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    arguments = {
        "model": MODEL_ID,
        "base_url": f"{address}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(MODEL),
    }
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "setpoint_facts",
        "--include_path", ".", "--apply_chat_template", "--batch_size", str(BATCH), "--model_args",
        ",".join(f"{key}={value}" for key, value in arguments.items()),
        "--output_path", str(tmp_path / "results"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=FOLDER, env=os.environ | offline, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "results").rglob("results_*.json")
    score = json.loads(written.read_text())["results"]["setpoint_facts"]["acc,none"]
    print(done.stdout)
    with httpx.Client(base_url=address, timeout=60) as client:
        assert score == pytest.approx(accuracy(scores(client)))
