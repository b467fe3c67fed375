"""The tables of docs/performance.md and docs/scale.md, written from the results, so that no figure stands there that
none of them has.

    python -m benchmarks.tables

Between `<!-- table NAME -->` and `<!-- /table -->` comes what benchmarks/results/NAME.json says, or that
there is no such result yet. What a table looks like follows from the first word of its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.capacity import report

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SCALE = PAGE.with_name("scale.md")
VLLM = PAGE.with_name("vllm.md")
MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- /table -->)", flags=re.DOTALL)
ABSENT = "*Not measured yet.*"

Body = Mapping[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (" | ".join(row) for row in (header, ["---"] * len(header), *rows))
    return "\n".join(f"| {line} |" for line in lines)


def _ratio(found: Mapping[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['least']:.2f}–{found['most']:.2f})" if found else "–"


def peers(body: Body) -> str:
    """Throughput beside other systems."""

    def cells(row: Body) -> list[str]:
        begin = [row["system"], row["mode"], str(row["batch"])]
        if "failed" in row:
            return [*begin, f"failed: {row['failed']}", *["–"] * 5]
        same = "–" if row["same"] is None else f"{row['same']:.2f}"
        ratios = [_ratio(row[name]) for name in ("to_generate", "to_own_unsteered", "to_generate_by_cpu")]
        return [*begin, f"{row['tokens_per_second']:.0f}", *ratios, same, f"{row['cores']:.2f}"]

    ratios = ("÷ `generate`", "÷ its own unsteered", "÷ `generate`, CPU time")
    header = ("system", "mode", "batch", "tok/s", *ratios, "same", "cores")
    absent = "".join(f" Left out: {name} ({why})." for name, why in body["absent"].items())
    versions = "; ".join(
        f"{system}: {', '.join(f'{name} {version}' for name, version in found.items())}"
        for system, found in body["versions"].items()
    )
    return (
        f"{table(header, map(cells, body['rows']))}\n\n"
        f"{body['model']}; prompts of {body['prompt_tokens']} tokens, answers of {body['tokens']}; {body['device']}, "
        f"threads: {body['threads']}; {body['repeats']} rounds, median (least–most). "
        f"{versions}.{absent}"
    )


def _pair(side: Body, name: str) -> str:
    values = [side.get(f"{name}_{share}_ms") for share in ("p50", "p99")]
    return "–" if None in values else " / ".join(f"{value:.1f}" for value in values)


def load(body: Body) -> str:
    """Latency under rising rates, or, where there is a verdict, of an endurance run."""
    measured = (f"{what} {side}" for what in ("TTFT", "ITL") for side in ("unsteered", "steered"))
    header = ("arrivals/s", "answered", "refused", "lost", "tok/s", *measured)
    rows = []
    for row in body.get("rows", [body]):
        done, refused = (row["outcomes"].get(name, 0) for name in ("done", "refused"))
        rows.append(
            [
                f"{row['rate']:g}",
                *map(str, (done, refused, row["requests"] - done - refused)),
                f"{row['tokens_per_second']:.0f}",
                *(_pair(row[side], name) for name in ("ttft", "itl") for side in ("unsteered", "steered")),
            ]
        )
    told = (
        f"{table(header, rows)}\n\n"
        f"Milliseconds, p50 / p99; model: {body['model']}; {body['processor']}, {body['max_batch']} places, share of "
        f"steered requests {body['steered_share']:g}, answers of {', '.join(map(str, body['answer_tokens']))} tokens."
    )
    if "verdict" in body:
        memory = body["memory"]
        verdict = ", ".join(
            f"{name.replace('_', ' ')}: {'yes' if held else 'no'}" for name, held in body["verdict"].items()
        )
        told += (
            f" {body['seconds'] / 60:.1f} minutes; resident memory {memory['first_mib']:.0f} MiB once warm, "
            f"{memory['last_mib']:.0f} MiB at the end, growth {100 * memory['growth']:.1f} %; {verdict}."
        )
    return told


def memory(body: Body) -> str:
    """Bytes by what they are for."""
    what = {
        "context": "a position of context",
        "slot": "a resident program",
        "known": "a known program, on the host",
    }
    rows = [
        [what[name], f"{row['measured_bytes']:.0f}", f"{row['formula_bytes']:.0f}"]
        for name, row in body["rows"].items()
    ]
    return (
        f"{table(('one more', 'bytes, measured', 'bytes, by the shapes'), rows)}\n\n"
        f"Model: {body['model']}, keys and values in {body['dtype']}; {body['device']}."
    )


def engine(body: Body) -> str:
    """Steered ÷ unsteered throughput."""
    rows = [
        [
            str(row["programs"]),
            str(row["interventions"]),
            f"{row['plain']:.0f}",
            f"{row['steered']:.0f}",
            _ratio({"median": row["ratio"], "least": row["least"], "most": row["most"]}),
        ]
        for row in body["rows"]
    ]
    header = ("programs", "interventions a request", "unsteered tok/s", "steered tok/s", "ratio")
    given = body["load"]
    return (
        f"{table(header, rows)}\n\n"
        f"{body['model']}; batch {given['batch']}, prompts of {given['prompt_tokens']} tokens, answers of "
        f"{given['max_tokens']}; {body['device']}, threads: {body['threads']}; {given['repeats']} pairs, median "
        "(least–most)."
    )


def capacity(body: Body) -> str:
    """A table of the capacity model, by the kind of result."""
    header, rows, note = report.KINDS[body["kind"]](body)
    return f"{table(header, rows)}\n\n{note}"


def parity(body: Body) -> str:
    """The vLLM engine beside the native one, row by row."""

    def cell(found: Body) -> str:
        if "refused" in found:
            return "refused"
        if "failed" in found:
            return f"failed: {found['failed']}"
        worst = found["receipt"]
        told = "" if worst is None else f", receipts to {worst:.0e}" if worst else ", receipts equal"
        return f"{100 * found['same']:.0f} %{told}"

    rows = [[name, row["method"], cell(row["vllm"]), cell(row["transformers"])] for name, row in body["rows"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in body["versions"].items())
    return (
        f"{table(('row', 'method', 'vLLM’s modelling code', 'transformers’ under vLLM'), rows)}\n\n"
        f"Share of answers that are the native engine's to the last token, and the largest difference of a number in "
        f"their receipts; {body['prompts']} prompts, {body['tokens']} tokens, greedy, float32. {versions}; "
        f"`{body['command']}`."
    )


KINDS: Mapping[str, Callable[[Body], str]] = {
    "parity": parity,
    "peers": peers,
    "load": load,
    "memory": memory,
    "engine": engine,
    "capacity": capacity,
}


def filled(page: str, results: Path) -> str:
    """The page with its tables as the results say. Raises KeyError for a table of an unknown kind."""

    def fill(found: re.Match[str]) -> str:
        name = found[2]
        render, file = KINDS[name.split("-")[0]], results / f"{name}.json"
        text = render(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else ABSENT
        return f"{found[1]}\n{text}\n\n{found[3]}"

    return MARKED.sub(fill, page)


def main() -> None:
    """Fill the pages in place."""
    for page in (PAGE, SCALE, VLLM):
        page.write_text(filled(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


if __name__ == "__main__":
    main()
