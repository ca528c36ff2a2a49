"""Run a recipe: load the model, go through the stages, write checkpoint, graph and report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..engine.export import export
from ..engine.lowering import Config, lower
from ..engine.schemes import GROUP_SIZES
from ..errors import GraphError, ModelError, ParingError
from ..modifiers import Session
from ..progress import Progress
from ..recipes import Recipe, Stage
from .checkpoint import (
    MASKS,
    WEIGHTS,
    config_values,
    publish,
    verify_checkpoint,
    write_checkpoint,
)
from .compare import PROMPT, compare, text_samples
from .data import check_data, training_examples
from .durable import no_room
from .evaluate import Exam, compare_speed
from .models import load_model, model_fingerprint, quiet_transformers
from .oneshot import named_device, run_oneshot
from .pared import Pared
from .processes import Processes
from .report import REPORT, layer_table, read_report, sparsity, versions, write_report
from .report_html import PAGE, render
from .reporters import check_reporters
from .runfolder import RunFolder
from .sources import data_fingerprint
from .teachers import SELF, Teachers
from .train import check_packing, run_training

LOGS = "runs"  # of TensorBoard, in the output folder


@dataclass
class ApplyResult:
    """What `apply` made. `report` is the content of report.json; `output` is None if nothing was written.

    `pared` is the model in memory, or None if the run had been finished before: load it from `output` then.
    """

    report: dict[str, Any]
    output: Path | None
    pared: Pared | None


def apply(
    recipe: Recipe | str | Path,
    model: str | Path | None = None,
    output: str | Path | None = None,
    *,
    resume: bool = True,
    evaluate: bool = True,
    verify: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> ApplyResult:
    """Apply a recipe to a model and write checkpoint, graph and report to `output`.

    recipe: a Recipe, or a path or library name to load. model: overrides the recipe's. output: None keeps the result
    in memory. resume: continue a killed run in `output` from its last finished block or Trainer checkpoint; False
    starts over. evaluate: measure perplexity (where the recipe says on what) and speed, before and after. verify: load
    the checkpoint with `transformers` before it is published, and compare its logits with those in memory. device:
    where one-shot stages compute, such as "cpu" or "cuda"; None: a GPU if there is one with room. The Trainer places
    itself.

    A finished run of the same recipe is returned at once. Raises the kinds of ParingError for bad input; with
    `output`, which gets a graph, also for an architecture that the engine does not know.

    Under `torchrun` each process trains on its part of every batch; the first does all else, and has the report.
    """
    options = _Options(evaluate, verify, named_device(device))
    processes = Processes.join()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    ref = str(model or recipe.model or "")
    if not ref:
        raise ModelError("the recipe names no model; add `model:` to it or give one with --model")
    recipe = recipe.model_copy(update={"model": ref})
    for stage in recipe.stages:
        check_reporters(stage.training.report_to if stage.training else ())
    if output is None:
        if processes.count > 1:
            raise ModelError("several processes share their work in a folder; give --output")
        return _Run(recipe, ref, None, options, progress).go()
    inputs = [model_fingerprint(ref, progress)]
    inputs += [model_fingerprint(teacher, progress) for teacher in _teachers(recipe)]
    configs = [*(stage.data for stage in recipe.stages), recipe.evaluate]
    inputs += [data_fingerprint(config) for config in configs if config is not None]
    if processes.count > 1:  # as many must resume it: each has its part of a batch
        inputs.append(f"{processes.count} processes")
    place = Path(output)
    with processes.together(), _room(place):
        if not processes.is_first:
            processes.wait()  # for the first to open it
            folder = RunFolder.follow(place)
            if not folder.is_done(evaluate):
                _Run(recipe, ref, folder, options, None, processes).go()
            processes.part()
            return ApplyResult({}, place, None)
        with RunFolder.open(place, recipe.to_yaml(), " ".join(inputs), not resume) as folder:
            processes.wait()
            if folder.is_done(evaluate):
                result = ApplyResult(read_report(folder.output / REPORT), folder.output, None)
            else:
                result = _Run(recipe, ref, folder, options, progress, processes).go()
            processes.part()
            return result


@contextmanager
def _room(place: Path) -> Iterator[None]:
    """ModelError where the disk of the output folder is full."""
    try:
        yield
    except ParingError:
        raise
    except Exception as error:
        if problem := no_room(error):
            raise ModelError(
                f"{place}: {problem}; make room on its disk, and the same command goes on from what was saved"
            ) from error
        raise


@dataclass(frozen=True)
class _Options:
    """How `apply` was asked to go about it; see there."""

    evaluate: bool
    verify: bool
    device: torch.device | None


class _Run:
    """One run, from the base model to the published result; `folder` is None if nothing is to be written."""

    def __init__(
        self,
        recipe: Recipe,
        ref: str,
        folder: RunFolder | None,
        options: _Options,
        progress: Progress | None,
        processes: Processes = Processes(),  # noqa: B008 - frozen
    ) -> None:
        self.recipe = recipe
        self.processes = processes
        self.ref = ref
        self.folder = folder
        self.options = options
        self.progress = progress
        self.pared = Pared.load(ref, progress)
        if folder:  # it gets a graph at the end: better to say now that the engine can't run one
            lower(Config(config_values(self.pared.model), ref))
            _check_group_sizes(recipe)
        self.stages: list[dict[str, Any]] = folder.stages if folder else []
        self.exam: Exam | None = None
        if (
            options.evaluate and recipe.evaluate is not None
        ):  # before the work: a bad data set is told at once
            self.exam = Exam.of(recipe.evaluate, self.pared.tokenizer)
        if processes.is_first:
            later = len(self.stages) + 1  # the next one reads its own at once
            for stage in recipe.stages[later:]:
                check_data(stage, self.pared.tokenizer)

    def go(self) -> ApplyResult:
        with quiet_transformers():
            return self._go()

    def _go(self) -> ApplyResult:
        before = self._measure_base() if self.processes.is_first else {}
        if self.folder and (state := self.folder.load_stage(self.pared.model)):
            self.pared.restore(state)
        with TemporaryDirectory(prefix="paring-") as temporary:
            for index in range(len(self.stages), len(self.recipe.stages)):
                name = f"stage-{index}"
                # Blocks are pared by one process, and the others take over the result.
                alone = self.recipe.stages[index].training is None
                if self.processes.is_first or not alone:
                    self._run_stage(
                        index, self.folder.work(name) if self.folder else Path(temporary, name)
                    )
                self._share(alone)
        if not self.processes.is_first:
            return ApplyResult({}, None, self.pared)
        layers = layer_table(self.pared.model, self.pared.masks, self.pared.quantization)
        parameters = sum(p.numel() for p in self.pared.model.parameters())
        report: dict[str, Any] = {
            "model": self.ref,
            "versions": versions(),
            "evaluate": self.exam.describe() if self.exam else None,
            "before": before,
            "after": {"sparsity": sparsity(layers), "parameters": parameters},
            "stages": self.stages,
            "layers": layers,
        }
        if self.folder:
            self._write(self.folder, report)
        elif self.exam:
            progress = _within(self.progress, "after")
            report["after"]["perplexity"] = self.exam.torch(self.pared.model, progress)
        return ApplyResult(report, self.folder.output if self.folder else None, self.pared)

    def _measure_base(self) -> dict[str, Any]:
        """What the base model is; kept in the run's record, so that a resumed run does not measure it again."""
        before: dict[str, Any] = self.folder.record["before"] if self.folder else {}
        if not before:
            model = self.pared.model
            before["sparsity"] = sparsity(layer_table(model, self.pared.masks, {}))
            before["parameters"] = sum(p.numel() for p in model.parameters())
            before["bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
        if self.exam and "perplexity" not in before:
            progress = _within(self.progress, "before")
            before["perplexity"] = self.exam.torch(self.pared.model, progress)
        if self.folder:
            self.folder.save()
        return before

    def _run_stage(self, index: int, work: Path) -> None:
        stage = self.recipe.stages[index]
        began = time.monotonic()
        session = Session(
            self.pared.model,
            stage.modifiers,
            tokenizer=self.pared.tokenizer,
            seed=_seed(stage),
            masks=self.pared.masks,
            quantization=self.pared.quantization,
            caches=self.pared.caches,
            load_teacher=Teachers(self.ref),
        )
        entry: dict[str, Any] = {"name": stage.name, "run": stage.run}
        if stage.training is None:
            progress = _within(self.progress, stage.name)
            chosen = run_oneshot(session, stage, work, progress, self.options.device)
            entry["device"] = str(chosen)
        else:
            assert stage.data is not None  # the schema asks for it
            examples = training_examples(stage.data, self.pared.tokenizer)
            progress = _within(self.progress, stage.name)
            if stage.data.packing:
                check_packing(self.pared.model)
            logs = self.folder.output / LOGS / stage.name if self.folder else None
            entry["log"] = run_training(session, stage.training, examples, work, progress, logs)
            session.to("cpu")  # from where the Trainer had it
        entry["seconds"] = round(time.monotonic() - began, 1)
        entry["modifiers"] = session.report
        if stage.training is not None:
            self.processes.wait()  # nobody reads the Trainer's checkpoints any more
        if not self.processes.is_first:
            return
        if self.folder:
            self.folder.finish_stage(entry, self.pared.model, self.pared.state())
        else:
            self.stages.append(entry)

    def _share(self, alone: bool) -> None:
        """What the first process has finished becomes the others' too."""
        self.processes.wait()
        if not self.processes.is_first and self.folder:
            self.folder.reload()
            self.stages = self.folder.stages
            if alone:
                self.pared = Pared.load(self.ref)
                if state := self.folder.load_stage(self.pared.model):
                    self.pared.restore(state)
        self.processes.wait()

    def _write(self, folder: RunFolder, report: dict[str, Any]) -> None:
        """Stage checkpoint, graph and report, measure them, and move all of it into the output folder."""
        staged, pared, after = folder.empty_work("result"), self.pared, report["after"]
        write_checkpoint(
            staged, pared.model, pared.tokenizer, pared.quantization, pared.masks, pared.caches
        )
        if self.options.verify:
            verify_checkpoint(staged, pared.model, folder.set_aside(pared.model))
        (staged / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
        graph = staged / "graph"
        export(staged, graph, head=self.recipe.export.head, embedding=self.recipe.export.embedding)
        after["checkpoint_bytes"] = sum(
            (staged / name).stat().st_size for name in (WEIGHTS, MASKS) if (staged / name).exists()
        )
        after["bytes"] = sum(file.stat().st_size for file in graph.iterdir())
        if self.exam:
            progress = _within(self.progress, "after")
            after["perplexity"] = self.exam.engine(graph, progress)
        if self.options.evaluate:
            base, tokenizer = load_model(self.ref, dequantize=True)
            work = folder.empty_work("speed")
            report["speed"] = compare_speed(base, tokenizer, graph, work, self.progress)
            if self.exam:
                report["comparison"] = compare(base, pared.model, self.exam.excerpts())
                prompts = self.exam.prompts(PROMPT)
                report["samples"] = text_samples(base, tokenizer, graph, prompts)
        write_report(staged / REPORT, report)
        page = render(report, self.recipe)
        (staged / PAGE).write_text(page, encoding="utf-8")
        names = sorted(path.name for path in staged.iterdir())
        folder.announce(names)
        publish(staged, folder.output, folder.record["published"])
        folder.finish(evaluated=self.options.evaluate)


def _check_group_sizes(recipe: Recipe) -> None:
    """GraphError for weights in groups that the engine has no kernels for."""
    for stage in recipe.stages:
        for modifier in stage.modifiers:
            groups = (getattr(modifier, "config_groups", None) or {}).values()
            sizes = [getattr(modifier, "group_size", None), *(g.weights.group_size for g in groups)]
            for size in sizes:
                if size is not None and size not in GROUP_SIZES:
                    raise GraphError(
                        f"{stage.name}: {modifier.key()} has group_size {size}; the engine decodes groups of"
                        f" {', '.join(map(str, GROUP_SIZES))}"
                    )


def _teachers(recipe: Recipe) -> list[str]:
    """Those that a recipe names, but for the model itself."""
    named = {getattr(m, "teacher", SELF) for stage in recipe.stages for m in stage.modifiers}
    return sorted(named - {SELF})


def _seed(stage: Stage) -> int:
    if stage.training is not None:
        return stage.training.seed
    return stage.data.seed if stage.data is not None else 0


def _within(progress: Progress | None, part: str) -> Progress | None:
    """`progress` with labels that begin with `part`, so that equal work in two parts gets a bar each."""
    if progress is None:
        return None

    def report(label: str, done: int, total: int, note: str = "") -> None:
        progress(f"{part}: {label}", done, total, note)

    return report
