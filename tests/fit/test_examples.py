"""Example files are read whole or refused with their line; the tokens a fit reads are the ones it says."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from steering.errors import SpecError
from steering.fit.examples import END_WEIGHT, MAX_EXAMPLES, checked_class, encode_example, read_examples
from steering.plant.plant import Plant
from tests.plants import tiny, tiny_tokenizer

CHAT = [{"role": "user", "content": "you see the cat ?"}, {"role": "assistant", "content": "yes , I love the cat"}]


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama", layers=2), tiny_tokenizer())


def written(folder: Path, text: str | bytes, name: str = "rows.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_one_text_a_line(tmp_path: Path) -> None:
    assert read_examples(written(tmp_path, " the cat \n\n\t\nthe dog\r\nsun")) == ["the cat", "the dog", "sun"]


def test_jsonl_by_its_name_or_by_its_first_line(tmp_path: Path) -> None:
    rows = [{"text": "the cat"}, {"messages": CHAT}, {"text": "more", "label": 1}]
    text = "\n".join(json.dumps(row) for row in rows)
    for name in ("rows.jsonl", "rows.txt"):
        assert read_examples(written(tmp_path, text, name)) == ["the cat", CHAT, "more"]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c", "\x1e"])
def test_a_separator_inside_a_row_does_not_end_it(tmp_path: Path, separator: str) -> None:
    row = json.dumps({"text": f"a{separator}b"}, ensure_ascii=False)
    if separator >= " ":  # JSON escapes the others
        assert separator in row
    assert read_examples(written(tmp_path, row, "rows.jsonl")) == [f"a{separator}b"]
    assert read_examples(written(tmp_path, f"a{separator}b\nc")) == [f"a{separator}b", "c"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert read_examples(written(tmp_path, '\ufeff{"text": "a"}')) == ["a"]
    assert read_examples(written(tmp_path, "\ufeffa")) == ["a"]


@pytest.mark.parametrize("content", ["", "\n \n", b"\xff\xfe\x00"])
def test_a_file_without_examples_is_named(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(SpecError, match=r"^rows\.txt: expected") as caught:
        read_examples(written(tmp_path, content))
    assert caught.value.param == "rows.txt"


def test_a_missing_file_is_named_without_its_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(SpecError, match="readable") as caught:
            read_examples(path)
        assert str(tmp_path.parent) not in caught.value.message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"text": "a"', "a JSON object"),
        ("[" * 100_000, "a JSON object"),
        ("the dog", "a JSON object"),
        ('["a"]', "`text` or `messages`"),
        ('{"txt": "a"}', "`text` or `messages`"),
        ('{"text": 3}', "`text` or `messages`"),
        ('{"text": " "}', "not empty"),
        ('{"messages": []}', "`role` and `content`"),
        ('{"messages": [{"role": "user"}]}', "`role` and `content`"),
        ('{"messages": [{"role": "user", "content": 3}]}', "`role` and `content`"),
        ('{"messages": ["a"]}', "`role` and `content`"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: str, expected: str) -> None:
    with pytest.raises(SpecError, match=expected) as caught:
        read_examples(written(tmp_path, f'{{"text": "a"}}\n\n{row}\n{{"text": "b"}}', "rows.jsonl"))
    assert caught.value.param == "rows.jsonl line 3"
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("examples", [[], ["one"], "a text is not a class", ["a"] * (MAX_EXAMPLES + 1)])
def test_a_class_of_an_impossible_size_is_named(examples: Any) -> None:
    with pytest.raises(SpecError, match=f"2 to {MAX_EXAMPLES} examples") as caught:
        checked_class("negative", examples)
    assert caught.value.param == "negative"


@pytest.mark.parametrize("row", [3, None, "", [], [{}], {"text": "a"}, [{"role": "user", "content": None}]])
def test_a_row_of_a_wrong_type_is_named(row: Any) -> None:
    with pytest.raises(SpecError) as caught:
        checked_class("positive", ["a", "b", row])
    assert caught.value.param == "positive[2]"


# Positions


def read(plant: Plant, example: Any, rule: str, skip: int = 0) -> str:
    ids, chosen = encode_example(plant, "positive[0]", example, rule, skip)
    return plant.tokenizer.decode([ids[i] for i in chosen])


def test_answer_is_the_assistants_last_message(plant: Plant) -> None:
    assert read(plant, CHAT, "answer") == "yes , I love the cat <end>"
    assert read(
        plant, [*CHAT, {"role": "user", "content": "why"}, {"role": "assistant", "content": "no"}], "answer"
    ) == ("no <end>")


def test_an_answer_alone_starts_behind_the_first_token(plant: Plant) -> None:
    assert read(plant, CHAT[1:], "answer").endswith("yes , I love the cat <end>")


def test_auto_follows_the_kind_of_example(plant: Plant) -> None:
    assert read(plant, CHAT, "auto") == read(plant, CHAT, "answer")
    assert read(plant, CHAT[:1], "auto") == read(plant, CHAT[:1], "last") == "<assistant>"
    assert read(plant, "the cat sat", "auto", skip=2) == read(plant, "the cat sat", "all", skip=2) == "cat sat"


def test_all_and_last(plant: Plant) -> None:
    assert read(plant, "the cat sat", "last") == "sat"
    assert read(plant, "the cat sat", "all", skip=1) == "the cat sat"
    assert read(plant, "the cat sat", "all", skip=99) == "sat"  # something is always read


def test_late_weighs_a_sentence_s_end_more(plant: Plant) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "the cat sat . the dog sat . the sun"}]
    ids, chosen = encode_example(plant, "positive[0]", chat, "late", 0)
    weight = Counter(chosen)
    words = {plant.tokenizer.decode([ids[i]]): weight[i] for i in weight}
    assert Fraction(words.pop("."), words["sun"]) == END_WEIGHT
    assert set(words.values()) == {words["sun"]}
    answer = encode_example(plant, "positive[0]", chat, "answer", 0)[1]
    assert sorted(weight) == list(answer)[len(answer) // 2 :]


def test_a_long_example_keeps_its_end(plant: Plant) -> None:
    words = ["cat"] * 200 + ["dog"]
    ids, chosen = encode_example(plant, "positive[0]", " ".join(words), "all", 8)
    assert len(ids) == plant.context
    assert (chosen.start, chosen.stop) == (0, plant.context)
    assert plant.tokenizer.decode(ids[-1:]) == "dog"
    long = [{"role": "user", "content": " ".join(words)}, CHAT[1]]
    assert read(plant, long, "answer") == "yes , I love the cat <end>"


@pytest.mark.parametrize("example", ["the cat", CHAT[:1]])
def test_an_answer_needs_an_assistant(plant: Plant, example: Any) -> None:
    with pytest.raises(SpecError, match="ends with the assistant") as caught:
        encode_example(plant, "negative[3]", example, "answer", 0)
    assert caught.value.param == "negative[3]"
