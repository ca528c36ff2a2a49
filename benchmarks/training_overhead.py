"""Seconds of a training step: a plain Trainer's, and those of Paring's loop with half of the weights held at zero.

Each loop is a process of its own, and they make an optimizer step each in turn, so that a machine that others slow down
slows both. (As two threads of one process they shared a heap, in which either could take a fifth longer than alone.)
Each order is run, for the one that goes second was a little faster.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from queue import Empty
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from paring import Session
from paring.modifiers import registry
from paring.pipeline import load_model
from paring.pipeline.data import training_examples
from paring.pipeline.examples import collate
from paring.pipeline.heap import kept_heap
from paring.pipeline.train import run_training
from paring.recipes import DataConfig, TrainingConfig

PLAIN, PARING = "plain", "paring"
TIMED, WARM = 18, 3  # pairs of steps of each order that are timed, steps before
PATIENCE = 600  # seconds for the other's step


class Turns(TrainerCallback):
    """Makes its loop wait before each step until the other has made one; seconds from one log to the next."""

    def __init__(self, mine: Semaphore, other: Semaphore, steps: int) -> None:
        self.mine, self.other, self.left = mine, other, steps
        self.began: float | None = None
        self.seconds: list[float] = []

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.end_step()

    def end_step(self, *args: Any) -> None:
        if self.began is not None:
            self.seconds.append(perf_counter() - self.began)
        self.other.release()
        self.left -= 1
        if self.left:
            self.wait()
        self.began = perf_counter()

    def wait(self) -> None:
        if not self.mine.acquire(timeout=PATIENCE):
            raise RuntimeError("the other loop has stopped")


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over pairs of steps. RuntimeError if one of the loops stops."""
    pairs = _pairs(options, (PLAIN, PARING)) + _pairs(options, (PARING, PLAIN))
    ratios = [pair[PARING] / pair[PLAIN] - 1 for pair in pairs]
    return {
        "plain_seconds": statistics.median(pair[PLAIN] for pair in pairs),
        "paring_seconds": statistics.median(pair[PARING] for pair in pairs),
        "overhead": statistics.median(ratios),
        "overhead_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "pairs": len(pairs),
        "threads": torch.get_num_threads(),
    }


def _pairs(options: argparse.Namespace, order: tuple[str, str]) -> list[dict[str, float]]:
    """Seconds of each loop, by pair of steps."""
    context = multiprocessing.get_context("spawn")
    turns = context.Semaphore(0), context.Semaphore(0)
    results = context.Queue()
    processes = [
        context.Process(target=_run, args=(options, name, mine, other, results, name == order[0]))
        for name, mine, other in zip(order, turns, reversed(turns), strict=True)
    ]
    for process in processes:
        process.start()
    found: dict[str, list[float]] = {}
    while len(found) < len(processes):
        try:
            found.update([results.get(timeout=1)])
        except Empty:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                raise RuntimeError("one of the two loops has stopped") from None
    for process in processes:
        process.join()
    return [dict(zip(found, pair, strict=True)) for pair in zip(*found.values(), strict=True)]


def _run(
    options: argparse.Namespace,
    name: str,
    mine: Semaphore,
    other: Semaphore,
    results: Any,
    starts: bool,
) -> None:
    """One loop, in its process."""
    # The last one does not count: once it has made its own, the first loop ends beside the second one's.
    turns = Turns(mine, other, WARM + TIMED + 2)
    with TemporaryDirectory() as folder:
        train = {PLAIN: _plain, PARING: _paring}[name](options, turns, Path(folder))
        if not starts:
            turns.wait()
        with kept_heap():  # as Paring's loop keeps it: without, a plain step takes longer
            train()
    results.put((name, turns.seconds[WARM : WARM + TIMED]))


def _plain(options: argparse.Namespace, turns: Turns, folder: Path) -> Callable[[], Any]:
    model, tokenizer = load_model(options.model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=turns.left,
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
    examples = training_examples(_data(options), tokenizer)
    trainer = Trainer(
        model, arguments, lambda batch: collate(batch, 0), examples, callbacks=[turns]
    )
    return trainer.train


def _paring(options: argparse.Namespace, turns: Turns, folder: Path) -> Callable[[], Any]:
    model, tokenizer = load_model(options.model)
    prune = registry()["MagnitudePruning"](sparsity=0.5, ignore=["lm_head"])
    once = Session(model, [prune])
    once.run_oneshot(None)
    hold = registry()["ConstantPruning"](ignore=["lm_head"])
    session = Session(model, [hold], tokenizer=tokenizer, masks=once.masks)
    training = TrainingConfig(
        epochs=1000.0,
        max_steps=turns.left,
        batch_size=options.batch_size,
        learning_rate=1e-6,
        save_steps=10 * turns.left,
        bf16=options.bf16,
    )
    examples = training_examples(_data(options), tokenizer)
    return lambda: run_training(session, training, examples, folder, turns.end_step)


def _data(options: argparse.Namespace) -> DataConfig:
    text = options.data / "wikitext-2/calibration.txt"
    return DataConfig(dataset=str(text), length=options.length // 2)
