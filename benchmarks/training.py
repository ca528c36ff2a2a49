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
import ctypes
import datetime
import json
import platform
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Semaphore
from typing import Any

import torch
import yaml
from tables import put
from transformers import Trainer, TrainerCallback, TrainingArguments

from paring import Recipe, Session, apply
from paring.engine.protocol import measure
from paring.modifiers import registry
from paring.pipeline import load_model
from paring.pipeline.data import training_examples
from paring.pipeline.examples import collate
from paring.pipeline.heap import kept_heap
from paring.pipeline.own_text import store_texts, write_texts
from paring.pipeline.pared import Pared
from paring.pipeline.train import run_training
from paring.recipes import DataConfig, TrainingConfig

HERE = Path(__file__).parent
OVERHEAD = "overhead"
QUANTIZED = " W8A8"  # after a case's name
W8A8 = [
    {"SmoothQuant": {"smoothing_strength": "auto", "ignore": ["lm_head"]}},
    {"GPTQ": {"scheme": "W8A8", "ignore": ["lm_head"]}},
]
OWN_TEXTS = 160  # of 320 tokens
CALIBRATION = {"samples": 16, "length": 512}
ARENA_MAX = -8  # of malloc.h
TIMED, WARM = 36, 3  # steps of each loop that are timed, steps before


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


class _Turns(TrainerCallback):
    """One of two loops in two threads that make an optimizer step each in turn, so that a machine that others slow down
    slows both; the seconds from one log to the next, with all that goes with a step."""

    def __init__(self, mine: Semaphore, other: Semaphore, steps: int) -> None:
        self.mine, self.other, self.left = mine, other, steps
        self.began: float | None = None
        self.seconds: list[float] = []

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.end_step()

    def end_step(self, *args: Any) -> None:
        if self.began is not None:
            self.seconds.append(time.perf_counter() - self.began)
        self.other.release()
        self.left -= 1
        if self.left and not self.mine.acquire(timeout=600):
            raise RuntimeError("the other loop has stopped")
        self.began = time.perf_counter()


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """A step of a plain Trainer, and one of Paring's loop with half of the weights held at zero; in turns."""
    model, tokenizer = load_model(options.model)
    pared, _ = load_model(options.model)
    data = str(options.data / "wikitext-2/calibration.txt")
    config = DataConfig(dataset=data, length=options.length // 2)
    examples = training_examples(config, tokenizer)
    training = TrainingConfig(
        epochs=1000.0,
        max_steps=WARM + TIMED,
        batch_size=options.batch_size,
        learning_rate=1e-6,
        save_steps=10 * TIMED,
        bf16=options.bf16,
    )
    prune = registry()["MagnitudePruning"](sparsity=0.5, ignore=["lm_head"])
    once = Session(pared, [prune])
    once.run_oneshot(None)
    hold = registry()["ConstantPruning"](ignore=["lm_head"])
    session = Session(pared, [hold], tokenizer=tokenizer, masks=once.masks)
    if platform.libc_ver()[0] == "glibc":
        # An arena of its own would make the second thread's loop a third slower.
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)
    first, second = Semaphore(0), Semaphore(0)
    own = _Turns(first, second, WARM + TIMED)
    plain = _Turns(second, first, WARM + TIMED)
    # As Paring's loop keeps the heap: without, a step takes longer.
    with kept_heap(), ThreadPoolExecutor(1) as pool, TemporaryDirectory() as nothing_to_resume:
        running = pool.submit(
            run_training, session, training, examples, Path(nothing_to_resume), own.end_step
        )
        if not second.acquire(timeout=600):
            running.result(timeout=0)
        # Only now: each sets up accelerate's one state anew.
        arguments = TrainingArguments(
            output_dir=str(options.work / OVERHEAD),
            max_steps=WARM + TIMED,
            per_device_train_batch_size=options.batch_size,
            learning_rate=1e-6,
            use_cpu=True,
            bf16=options.bf16,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model, arguments, lambda batch: collate(batch, 0), examples, callbacks=[plain]
        )
        trainer.train()
        running.result()
    pairs = list(zip(plain.seconds[WARM - 1 :], own.seconds[WARM - 1 :], strict=True))
    return {
        "case": OVERHEAD,
        "bf16": options.bf16,
        "plain_seconds": statistics.median(seconds for seconds, _ in pairs),
        "paring_seconds": statistics.median(seconds for _, seconds in pairs),
        "overhead": statistics.median(ours / theirs for theirs, ours in pairs) - 1,
        "overhead_quartiles": [
            q - 1 for q in statistics.quantiles((o / t for t, o in pairs), n=4)[::2]
        ],
        "threads": torch.get_num_threads(),
    }


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
            f" {TIMED} pairs of steps in turn {speed['overhead_quartiles'][0]:+.1%} and"
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
            result = overhead(options)
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
