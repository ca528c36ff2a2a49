"""One-shot cases under the accuracy protocol, Paring beside llm-compressor; results are kept, so it can be stopped.

    python benchmarks/accuracy.py --model DIR --data DIR --results FILE.jsonl
        [--peer PYTHON] [--cases NAME ...] [--again] [--table FILE.md]

Calibrates on the first 64 windows of 512 tokens of `wikitext-2/calibration.txt` and evaluates 40 windows of
`wikitext-2/dev.txt`. The cases, with what each is compared with, are in `accuracy_cases.yaml`; the names of
llm-compressor's (`llmc-...`) are those of `peers/llmcompressor_oneshot.py`, which runs under `--peer`, the interpreter
of an environment that has llmcompressor. A case that is in FILE.jsonl is not run again unless `--again` is given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tables import put
from transformers import AutoModelForCausalLM, AutoTokenizer

from paring import Recipe, Session

HERE = Path(__file__).parent
LENGTH, SAMPLES, WINDOWS = 512, 64, 40


def windows(tokenizer: Any, file: Path, count: int) -> torch.Tensor:
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = min(count, len(ids) // LENGTH)
    return torch.tensor(ids[: count * LENGTH]).reshape(count, LENGTH)


@torch.no_grad()
def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    total = 0.0
    for row in rows:
        logits = model(row[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


def report(label: str, done: int, total: int, note: str = "") -> None:
    print(f"  {label} {done}/{total} {note}", file=sys.stderr, flush=True)


def own_case(
    name: str, stages: list[list[dict[str, Any]]], model: str, data: Path
) -> dict[str, Any]:
    """Run the modifiers of each stage, one after the other, and measure."""
    document = {
        "version": 1,
        "stages": [
            {"name": f"stage{i}", "run": "oneshot", "modifiers": modifiers}
            for i, modifiers in enumerate(stages)
        ],
    }
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration = windows(tokenizer, data / "wikitext-2/calibration.txt", SAMPLES)
    began = time.perf_counter()
    masks = quantization = None
    reports = {}
    if stages:
        for stage in Recipe.parse(yaml.safe_dump(document), source=name).stages:
            session = Session(
                network,
                stage.modifiers,
                tokenizer=tokenizer,
                masks=masks,
                quantization=quantization,
            )
            session.run_oneshot(calibration, report, None)
            masks, quantization = session.masks, session.quantization
            reports[stage.name] = session.report
    seconds = time.perf_counter() - began
    linears = [m for n, m in network.named_modules() if n.endswith("_proj")]
    zeros = sum(int((m.weight == 0).sum()) for m in linears)
    measured = perplexity(network, windows(tokenizer, data / "wikitext-2/dev.txt", WINDOWS))
    return {
        "case": name,
        "perplexity": measured,
        "seconds": seconds,
        "zeros": zeros / sum(m.weight.numel() for m in linears),
        "skipped": [
            layer
            for found in reports.values()
            for section in found.values()
            for layer in section.get("skipped", [])
        ],
        "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def peer_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    script = HERE / "peers/llmcompressor_oneshot.py"
    case = name.removeprefix("llmc-")
    line = subprocess.run(
        [options.peer, script, case, "--model", options.model, "--data", options.data],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.splitlines()[-1]
    return {**json.loads(line), "case": name}


def table(cases: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """What was measured, in the order of the cases; minutes are of pruning and quantizing, evaluation not counted."""
    dense = found.get("dense", {}).get("perplexity")
    lines = [
        "| case | perplexity | of dense | compared with | ratio | asked | minutes, threads | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        if name not in found:
            continue
        row = found[name]
        mine, spent = row["perplexity"], f"{row['seconds'] / 60:.1f}, {row.get('threads', 1)}"
        against = case.get("against", "")
        other = found.get(against, {}).get("perplexity")
        cells = [
            case.get("title", name),
            f"{mine:.2f}",
            f"{mine / dense:.3f}" if dense else "",
            f"{cases[against].get('title', against)} {other:.2f}" if other else "",
            f"{mine / other:.3f}" if other else "",
            str(case.get("reach", "")),
            spent if row["seconds"] >= 1 else "",
            row["date"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder of SmolLM2-135M")
    parser.add_argument("--data", required=True, type=Path, help="the folder with wikitext-2/")
    parser.add_argument(
        "--results", required=True, type=Path, help="JSON lines, one a case; added to"
    )
    parser.add_argument("--peer", help="interpreter of llm-compressor's environment")
    parser.add_argument("--cases", nargs="*", help="names; not given: all; none: only the table")
    parser.add_argument("--file", type=Path, default=HERE / "accuracy_cases.yaml")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", type=Path, help="write the table into this page")
    options = parser.parse_args()
    cases = yaml.safe_load(options.file.read_text())
    for name in cases if options.cases is None else options.cases:
        if name not in cases:
            parser.error(f"{name}: no such case; there are {', '.join(cases)}")
        kept = options.results.read_text().splitlines() if options.results.exists() else []
        if not options.again and name in {json.loads(line)["case"] for line in kept}:
            continue
        if name.startswith("llmc-"):
            if not options.peer:
                continue
            result = peer_case(name, options)
        else:
            stages = cases[name].get("stages") or [cases[name]["modifiers"]]
            result = own_case(name, [s for s in stages if s], options.model, options.data)
        result["date"] = datetime.date.today().isoformat()
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    found = {row["case"]: row for row in map(json.loads, lines)}
    text = table(cases, found)
    print(text)
    if options.table:
        put(options.table, "accuracy.py", text)


if __name__ == "__main__":
    main()
