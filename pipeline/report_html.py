"""report.html: report.json as a page of its own, with pictures; nothing is fetched when it is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from .report import size_change
from .report_figures import blocks, curves, inline, layers, ranges, split_name

if TYPE_CHECKING:
    from ..recipes import Recipe

PAGE = "report.html"
UNDRAWN = frozenset({"step", "epoch", "loss/total"})
NAMES = {
    "loss/task": "cross entropy",
    "loss/task_parts": "cross entropy of the parts that count",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}
STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f7fa; color: #1f2933; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 20px 0 6px; } p.faint, .faint { color: #7b8794; } p { margin: 4px 0 10px; }
section, .tile { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; }
section { padding: 16px 20px; margin-bottom: 16px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 24px 0; }
.tile { padding: 14px 18px; } .tile b { display: block; font-size: 25px; font-weight: 650; }
.tile span { color: #7b8794; font-size: 13px; }
svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 12px 6px 0; vertical-align: top; border-bottom: 1px solid #e4e7eb; }
th { color: #7b8794; font-weight: 500; } table.said { table-layout: fixed; overflow-wrap: anywhere; }
table.said td { white-space: pre-wrap; }
td.prompt { color: #7b8794; }
pre { margin: 0; font: 13px/1.5 ui-monospace, monospace; overflow-x: auto; }
"""


def render(report: Mapping[str, Any], recipe: Recipe, title: str = "") -> str:
    """The page. What a run did not measure has no part on it."""
    name = title or str(report["model"]).rstrip("/").rpartition("/")[2]
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="faint">{escape(_about(report))}</p>',
        _tiles(report),
        *_plan(recipe),
        *(
            part
            for index, _ in enumerate(report["stages"])
            for part in _stage(report, recipe, index)
        ),
        *_layers(report),
        *_comparison(report.get("comparison") or {}),
        *_samples(report.get("samples") or []),
        "<h2>Recipe</h2>",
        f"<section><pre>{escape(recipe.to_yaml())}</pre></section>",
        f'<p class="faint">{escape(_versions(report))}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _about(report: Mapping[str, Any]) -> str:
    seconds = sum(stage["seconds"] for stage in report["stages"])
    spent = f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    count = len(report["stages"])
    return f"{report['model']} · {count} {'stage' if count == 1 else 'stages'} in {spent}"


def _tiles(report: Mapping[str, Any]) -> str:
    before, after = report["before"], report["after"]
    tiles = [(f"{after['sparsity']:.1%}", f"zeros, from {before['sparsity']:.1%}")]
    if before.get("parameters") != after.get("parameters"):
        gone = 1 - after["parameters"] / before["parameters"]
        tiles.append((f"{gone:.1%}", f"of {before['parameters'] / 1e6:.1f} M parameters removed"))
    if "bytes" in after:
        old, new = before["bytes"] / 1e6, after["bytes"] / 1e6
        tiles.append((f"{new:.3g} MB", f"{size_change(old, new)} than {old:.3g} MB"))
    if "perplexity" in after:
        old, new = before["perplexity"], after["perplexity"]
        on = report["evaluate"]["dataset"].rpartition("/")[2]
        tiles.append((f"{new:.2f}", f"perplexity on {on}, {new / old:.2f} x of {old:.2f}"))
    if "speed" in report:
        speed = report["speed"]
        factor = speed["pared"] / speed["dense"]
        tiles.append((f"{speed['pared']:.0f} tokens/s", f"{factor:.1f} x of dense float32"))
    cells = (
        f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _plan(recipe: Recipe) -> Iterator[str]:
    from ..recipes.plan import Plan
    from ..recipes.plan_picture import render as draw

    yield "<h2>What was done</h2>"
    picture = draw(Plan.of(recipe), "svg").decode()
    yield f"<section>{inline(picture)}</section>"


def _stage(report: Mapping[str, Any], recipe: Recipe, index: int) -> Iterator[str]:
    stage = report["stages"][index]
    log = stage.get("log") or []
    if not log:
        return
    yield f"<h2>Training: {escape(stage['name'])}</h2>"
    keys = list(dict.fromkeys(key for entry in log for key in entry))
    if not any(key.startswith("loss/") and key not in ("loss/task", "loss/total") for key in keys):
        keys = [key for key in keys if key != "loss/task"]  # the only part is the loss
    panels = {
        NAMES.get(key, key.removeprefix("loss/")): [
            (entry["step"], entry[key]) for entry in log if key in entry
        ]
        for key in sorted(keys, key=_rank)
        if key not in UNDRAWN and not key.endswith("/sparsity")
    }
    per_epoch = log[-1]["step"] / max(log[-1]["epoch"], 1e-9)
    yield f"<section>{curves(panels, _scheduled(recipe, index, per_epoch, log[-1]['step']))}</section>"


def _rank(key: str) -> tuple[int, str]:
    first = ["loss", "loss/task"]
    if key in first:
        return first.index(key), key
    return (2, key) if key.startswith("loss/") else (3 + (key != "sparsity"), key)


def _scheduled(
    recipe: Recipe, index: int, per_epoch: float, last: float
) -> dict[str, list[tuple[float, float]]]:
    """The sparsities that the stage's modifiers were to have, over the steps, to the stage's end."""
    from ..recipes.plan import Plan

    found = {}
    for row in Plan.of(recipe, per_epoch=per_epoch).stages[index].rows:
        if row.curve and row.lasting:
            # What is due at step s is there once it is done, as its entry s + 1 of the log tells.
            curve = [(epoch * per_epoch + 1, value) for epoch, value in row.curve]
            kept = [(step, value) for step, value in curve if step <= last]
            found[row.name] = [*kept, (last, kept[-1][1])] if kept else curve
    return found


def _layers(report: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Layers</h2>"
    sparsity = {layer["name"]: layer["sparsity"] for layer in report["layers"]}
    pictures = [layers(sparsity, "Zeros in each layer, %", percent=True)]
    for stage in report["stages"]:
        for label, section in stage["modifiers"].items():
            for what, values in measures(section, set(sparsity)).items():
                if what != "sparsity":
                    title = f"{label} in {stage['name']}: {what.replace('_', ' ')}"
                    pictures.append(layers(values, title, percent=False))
    yield from (f"<section>{picture}</section>" for picture in pictures if picture)
    schemes: dict[str, int] = {}
    for layer in report["layers"]:
        schemes[layer["scheme"]] = schemes.get(layer["scheme"], 0) + 1
    told = ", ".join(f"{count} {scheme}" for scheme, count in schemes.items())
    yield f'<p class="faint">{len(sparsity)} layers: {escape(told)}</p>'


def measures(section: Any, names: set[str]) -> dict[str, dict[str, float]]:
    """Whatever numbers a modifier's part of the report holds by layer, by what they are: {error: {layer: number}}."""
    found: dict[str, dict[str, float]] = {}
    for key, value in section.items() if isinstance(section, dict) else ():
        if not isinstance(value, dict):
            continue
        for name, entry in value.items():
            layer = name.removesuffix(".weight")
            if layer not in names:
                continue
            for what, number in entry.items() if isinstance(entry, dict) else [(key, entry)]:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    found.setdefault(what, {})[layer] = float(number)
    return found


def _comparison(found: Mapping[str, Any]) -> Iterator[str]:
    if not found:
        return
    yield "<h2>Before and after</h2>"
    yield '<p class="faint">Both models read the same few hundred tokens.</p>'
    yield f"<section>{blocks(found['block_errors'])}</section>"
    picture = ranges(found["input_ranges"])
    if picture:
        yield f"<section>{picture}</section>"
    readers: dict[tuple[int, float, float], list[str]] = {}  # that read the same
    for name, (old, new) in found["input_ranges"].items():
        block, kind = split_name(name) or (-1, name)
        readers.setdefault((block, old, new), []).append(kind.rpartition(".")[2])
    widest = sorted(readers.items(), key=lambda item: -item[0][2])[:5]
    rows = "".join(
        f"<tr><td>{'' if block < 0 else f'block {block}: '}{escape(', '.join(kinds))}</td>"
        f"<td>{old:.4g}</td><td>{new:.4g}</td></tr>"
        for (block, old, new), kinds in widest
    )
    head = "<tr><th>layer</th><th>before</th><th>after</th></tr>"
    yield f"<section><h3>Widest inputs</h3><table>{head}{rows}</table></section>"


def _samples(samples: list[Mapping[str, str]]) -> Iterator[str]:
    if not samples:
        return
    rows = "".join(
        f'<tr><td class="prompt">{escape(s["prompt"])}</td><td>{escape(s["before"])}</td>'
        f"<td>{escape(s['after'])}</td></tr>"
        for s in samples
    )
    yield "<h2>What it says</h2>"
    yield f"<section><table class='said'><tr><th>text</th><th>before</th><th>after</th></tr>{rows}</table></section>"


def _versions(report: Mapping[str, Any]) -> str:
    parts = [f"{name} {version}" for name, version in report["versions"].items()]
    machine = report.get("speed", {}).get("machine")
    return " · ".join([*parts, *([str(machine)] if machine else [])])
