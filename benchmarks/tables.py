"""Tables that the benchmarks keep up to date inside a page."""

from __future__ import annotations

from pathlib import Path


def put(file: Path, name: str, text: str) -> None:
    """Write `text` into a Markdown file between the lines `<!-- name -->` and `<!-- end of name -->`.

    A file that has no such lines becomes the text.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    page = file.read_text() if file.exists() else ""
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    file.write_text(f"{before}{begin}{text}{end}{after}" if found and ended else text)
