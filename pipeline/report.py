"""report.json: what a run changed, layer by layer and as a whole, and the table that shows it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel

    from ..modifiers import Masks
    from ..modifiers.quantization.layer import LayerQuantization

REPORT = "report.json"
BUSY = 1.5  # load per CPU above which speeds tell little
PACKAGES = ("paring", "torch", "transformers", "compressed-tensors", "numpy")


def layer_table(
    model: PreTrainedModel, masks: Masks, quantization: Mapping[str, LayerQuantization]
) -> list[dict[str, Any]]:
    """One entry per Linear, the logits matrix left out: shape [out, in], sparsity (fraction of zeros), scheme.

    Where a mask is held it alone tells what is pruned: a kept weight may round to zero.
    """
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        mask = masks.get(f"{name}.weight")
        kept = int(mask.sum()) if mask is not None else int(module.weight.count_nonzero())
        layer = quantization.get(name)
        found.append(
            {
                "name": name,
                "shape": list(module.weight.shape),
                "sparsity": 1 - kept / module.weight.numel(),
                "scheme": layer.scheme if layer else "float",
            }
        )
    return found


def sparsity(layers: list[dict[str, Any]]) -> float:
    """The fraction of zeros among all weights of the table."""
    sizes = [entry["shape"][0] * entry["shape"][1] for entry in layers]
    zeros = sum(entry["sparsity"] * size for entry, size in zip(layers, sizes, strict=True))
    return float(zeros / max(sum(sizes), 1))


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def write_report(file: Path, report: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_report(file: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def summary_table(report: Mapping[str, Any]) -> Table:
    """Sparsity, parameters (where any went), bytes, perplexity and speed, before and after, as a rich table."""
    from rich.table import Table

    before, after = report["before"], report["after"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("before", "after"):
        table.add_column(title, justify="right")
    table.add_column("")
    table.add_row(
        "sparsity", f"{before['sparsity']:.1%}", f"{after['sparsity']:.1%}", _schemes(report)
    )
    if before.get("parameters") != after.get("parameters"):
        old, new = before["parameters"], after["parameters"]
        table.add_row("parameters", _millions(old), _millions(new), f"{1 - new / old:.1%} removed")
    if "bytes" in after:
        change = size_change(before["bytes"], after["bytes"])
        table.add_row("size", _megabytes(before["bytes"]), _megabytes(after["bytes"]), change)
    if "perplexity" in after:
        old, new, on = before["perplexity"], after["perplexity"], report["evaluate"]
        note = f"{new / old:.2f} x on {on['dataset']}, {on['windows']} x {on['length']} tokens"
        table.add_row("perplexity", f"{old:.2f}", f"{new:.2f}", note)
    if "speed" in report:
        speed = report["speed"]
        pared = f"{speed['pared']:.1f}"
        for name, label in (("dense", "dense FP32, same engine"), ("torch", "dense FP32, torch")):
            note = f"{speed['pared'] / speed[name]:.1f} x {label}"
            table.add_row("tokens/s", f"{speed[name]:.1f}", pared, note)
        if speed["load"] > BUSY:
            table.caption = "The machine was busy: measure the speed again, with `recipe bench`."
    return table


def size_change(before: float, after: float) -> str:
    """Such as `2.3 x smaller`; a graph can also be larger, with a logits matrix of its own beside the embedding."""
    if after <= before:
        return f"{before / after:.1f} x smaller"
    return f"{after / before:.1f} x larger"


def _schemes(report: Mapping[str, Any]) -> str:
    """How many layers each scheme took, such as `207 layers W8A8, 3 float`."""
    counts: dict[str, int] = {}
    for entry in report["layers"]:
        counts[entry["scheme"]] = counts.get(entry["scheme"], 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} layers {scheme}" for scheme, count in ranked)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.1f} k"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
