"""Recovery, sparse fine-tuning, losses and overhead of training, each beside its control; it can be stopped.

    python benchmarks/training.py --model DIR --data DIR --results FILE.jsonl --work DIR
        [--cases NAME ...] [--steps 300] [--bf16] [--again] [--table FILE.md]

The cases are in `training_cases.yaml`. Training also adapts a model to the text's style, so each recovery is compared
with the dense model after the same steps. A case is measured on 40 windows of 512 tokens of `wikitext-2/dev.txt`, on
the answers of 64 problems of `gsm8k/dev.jsonl`, and on the text again with W8A8 after it. Checkpoints stay in --work: a
case that starts from another finds it there, a stopped one goes on from its last saved step, and one whose result with
these steps is in FILE.jsonl is not run again unless `--again` is given. `overhead` times steps of Paring's loop and of
a plain Trainer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tables import put
from training_overhead import overhead

from paring import Recipe, apply
from paring.engine.protocol import measure
from paring.pipeline import load_model
from paring.pipeline.own_text import store_texts, write_texts
from paring.pipeline.pared import Pared

HERE = Path(__file__).parent
OVERHEAD = "overhead"
QUANTIZED = " W8A8"  # after a case's name
W8A8 = [
    {"SmoothQuant": {"smoothing_strength": "auto", "ignore": ["lm_head"]}},
    {"GPTQ": {"scheme": "W8A8", "ignore": ["lm_head"]}},
]
OWN_TEXTS = 160  # of 320 tokens
CALIBRATION = {"samples": 16, "length": 512}


def report(label: str, done: int, total: int, note: str = "") -> None:
    print(f"  {label} {done}/{total} {note}", file=sys.stderr, flush=True)


def perplexities(pared: Pared, options: argparse.Namespace) -> dict[str, float]:
    """On the development text and on the answers."""
    tokenizer, model = pared.tokenizer, pared.model.eval()

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return found["input_ids"], found["offset_mapping"]

    @torch.inference_mode()
    def logits(ids: list[int]) -> Any:
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()

    text = measure(options.data / "wikitext-2/dev.txt", encode, logits, options.windows)
    answers = measure(options.data / "gsm8k/dev.jsonl", encode, logits, options.items)
    return {"text": text.value, "answers": answers.value}


def run_case(
    name: str, case: dict[str, Any], cases: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Apply the case's recipe (what it starts from first), and measure what came out."""
    for needed in ("model", "teacher"):
        folder_of(case.get(needed, "dense"), cases, options)
    if "${own}" in str(case.get("stages", "")):
        own_text(options)
    whole = not (options.work / name).exists()  # else another process had its part of it
    began = time.process_time()
    output = folder_of(name, cases, options)
    result = {
        "case": name,
        "steps": options.steps,
        "bf16": options.bf16,
        "core_seconds": round(time.process_time() - began, 1) if whole else None,
        "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    kept = json.loads((output / "report.json").read_text()) if name != "dense" else {}
    stages = kept.get("stages", [])
    result["stage_seconds"] = {stage["name"]: stage["seconds"] for stage in stages}
    logs = [stage["log"] for stage in stages if stage.get("log")]
    result["last_loss"] = {k: v for k, v in logs[-1][-1].items() if "loss" in k} if logs else {}
    result["sparsity"] = kept.get("after", {}).get("sparsity", 0.0)
    return result | perplexities(Pared.load(str(output)), options)


def run_w8a8(
    name: str, case: dict[str, Any], cases: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """The case's checkpoint as the shipped recipes quantize it, calibrated on some of what it was trained on."""
    base = folder_of(name, cases, options)
    data = case["stages"][-1]["data"]
    quantize = {"run": "oneshot", "modifiers": W8A8, "data": {**data, **CALIBRATION}}
    output = Path(options.work / (name + QUANTIZED))
    apply(
        recipe_of(name, str(base), [quantize], options),
        output=output,
        evaluate=False,
        progress=report,
    )
    found = perplexities(Pared.load(str(output)), options)
    return {"case": name + QUANTIZED, "steps": options.steps, "bf16": options.bf16} | found


def folder_of(name: str, cases: dict[str, Any], options: argparse.Namespace) -> Path:
    """The checkpoint of a case, made now if it isn't there; a finished one is found at once."""
    if name == "dense":
        return Path(options.model)
    case = cases[name]
    base = folder_of(case.get("model", "dense"), cases, options)
    teacher = folder_of(case.get("teacher", "dense"), cases, options)
    output = Path(options.work / name)
    recipe = recipe_of(name, str(base), case["stages"], options, teacher=str(teacher))
    apply(recipe, output=output, evaluate=False, progress=report)
    return output


def recipe_of(
    name: str, model: str, stages: list[Any], options: argparse.Namespace, teacher: str = ""
) -> Recipe:
    args = {
        "own": str(own_text(options)) if "${own}" in str(stages) else "",  # takes minutes to write
        "text": str(options.data / "wikitext-2/calibration.txt"),
        "problems": str(options.data / "gsm8k/train.jsonl"),
        "dense": options.model,
        "teacher": teacher,
        **{key: getattr(options, key) for key in ("steps", "batch_size", "length", "samples")},
        "bf16": options.bf16,
    }
    document = {"version": 1, "model": model, "args": args, "stages": stages}
    return Recipe.parse(yaml.safe_dump(document), source=name)


def own_text(options: argparse.Namespace) -> Path:
    """What the dense model writes by itself, made once."""
    file: Path = options.work / "own.jsonl"
    if not file.exists():
        model, tokenizer = load_model(options.model)
        store_texts(file, write_texts(model, tokenizer, OWN_TEXTS, progress=report))
    return file


def quantizes(name: str, cases: dict[str, Any]) -> bool:
    """Whether a case is measured with W8A8 too: where a ratio was asked for."""
    return "reach" in cases.get(name, {})


def table(cases: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """Markdown: perplexities, ratio to the control, and what was asked for."""
    lines = [
        "| case | sparsity | text | answers | + W8A8 | against | ratio | asked | core minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        same = case.get("same", name)
        mine = found.get(same)
        if mine is None:
            continue
        control = found.get(case.get("against", ""))
        by = case.get("by", "text")
        int8 = found.get(same + QUANTIZED)
        cost = f"{int8[by] / mine[by] - 1:+.1%}" if int8 else ""
        ratio = f"{mine[case['by']] / control[case['by']]:.3f}" if control else ""
        seconds = mine["core_seconds"]
        minutes = "" if seconds is None else f"{seconds / 60:.0f}"
        lines.append(
            f"| {name} | {mine['sparsity']:.0%} | {mine['text']:.2f} | {mine['answers']:.2f}"
            f" | {cost} | {case.get('against', '')} | {ratio}"
            f" | {case.get('reach', '')} | {minutes} |"
        )
    if OVERHEAD in found:
        speed = found[OVERHEAD]
        lines.append(
            f"\nSeconds of a step: plain Trainer {speed['plain_seconds']:.2f}, Paring"
            f" {speed['paring_seconds']:.2f}; overhead {speed['overhead']:+.1%} (asked: 3 %; quartiles of"
            f" {speed['pairs']} pairs of steps in turn {speed['overhead_quartiles'][0]:+.1%} and"
            f" {speed['overhead_quartiles'][1]:+.1%})."
        )
    return "\n".join(lines) + "\n"


def parse(cases: dict[str, Any]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the dense model, a Hugging Face folder")
    parser.add_argument("--data", required=True, type=Path, help="has wikitext-2/ and gsm8k/")
    parser.add_argument("--results", required=True, type=Path, help="JSON lines; added to")
    parser.add_argument("--work", required=True, type=Path, help="checkpoints are kept here")
    parser.add_argument("--cases", nargs="*", help="names; not given: all; none: only the table")
    parser.add_argument(
        "--steps", type=int, default=300, help="of a recovery; the yaml says of what else"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="calibration; training has half")
    parser.add_argument("--samples", type=int, default=64, help="of calibration")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", type=Path, help="write the table into this page")
    options = parser.parse_args()
    names = [*cases, OVERHEAD]
    if options.cases is None:
        options.cases = names
    for name in options.cases:
        if name not in names:
            parser.error(f"{name}: no such case; there are {', '.join(names)}")
    return options


def rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What was measured with these steps and this arithmetic, by case."""
    file = options.results
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    asked = {"steps": options.steps, "bf16": options.bf16}
    return {row["case"]: row for row in found if {**asked, **row}.items() >= asked.items()}


def main() -> None:
    cases = yaml.safe_load((HERE / "training_cases.yaml").read_text())
    options = parse({name: case or {} for name, case in cases.items()})
    known = rows(options)
    chosen = dict.fromkeys(cases.get(name, {}).get("same", name) for name in options.cases)
    for name in (each for case in chosen for each in (case, case + QUANTIZED)):
        case = name.removesuffix(QUANTIZED)
        if (name in known and not options.again) or (name != case and not quantizes(case, cases)):
            continue
        if case == OVERHEAD:
            result = {"case": OVERHEAD, "bf16": options.bf16, **overhead(options)}
        else:
            run = run_case if name == case else run_w8a8
            result = run(case, cases[case], cases, options)
        result["date"] = datetime.date.today().isoformat()
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
    text = table(cases, rows(options))
    print(text)
    if options.table:
        put(options.table, "training.py", text)


if __name__ == "__main__":
    main()
