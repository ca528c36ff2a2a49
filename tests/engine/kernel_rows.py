"""Builds and runs kernel_rows.cpp where the Python tests can't go: every kernel row against `reference`.

    python tests/engine/kernel_rows.py arm        # cross-compiled, under qemu-aarch64
    python tests/engine/kernel_rows.py sanitize   # here, with the address and undefined sanitizers

On Debian, `arm` needs the packages g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOBS = 2
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "cd")] + AVX2


@dataclass(frozen=True)
class Target:
    """A machine to build for: a row's instruction sets by the suffix of their sources."""

    compiler: str
    flags: list[str]
    sets: dict[str, list[str]]
    run: list[str] = field(default_factory=list)


TARGETS = {
    "arm": Target(
        "aarch64-linux-gnu-g++",
        ["-O2", "-static"],
        {"neon": [], "neon_dotprod": ["-march=armv8.2-a+dotprod"]},
        ["qemu-aarch64"],
    ),
    "sanitize": Target(
        "g++",
        ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        {
            "avx2": AVX2,
            "avx512": AVX512,
            "avx512_vnni": [*AVX512, "-mavx512vnni"],
            "avx512_vbmi2": [*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2"],
        },
    ),
}
SETS = sorted({name for target in TARGETS.values() for name in target.sets}, key=len)


def missing(name: str) -> str | None:
    """What this machine lacks for a target, or None."""
    target = TARGETS[name]
    tools = [tool for tool in (target.compiler, *target.run) if shutil.which(tool) is None]
    if tools:
        return "there is no " + " and no ".join(tools)
    if not target.run and platform.machine() != "x86_64":
        return "its rows are those of x86-64"
    return None


def instruction_set(source: Path) -> str | None:
    return next((name for name in reversed(SETS) if source.stem.endswith("_" + name)), None)


def build(name: str) -> Path:
    """The program for a target, in build/; only what changed is compiled."""
    target, folder = TARGETS[name], ROOT / "build" / f"kernel_rows_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*(ROOT / "cpp/kernels").glob("*.cpp"), ROOT / "cpp/dispatch.cpp"]
    sources = [s for s in sources if (instruction_set(s) or "") in {"", *target.sets}]
    common = [target.compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    common += [*target.flags, f"-I{ROOT / 'cpp'}"]
    common += [f"-DPARING_HAVE_{known.upper()}=1" for known in target.sets]

    def compile_one(source: Path) -> str:
        made = folder / (source.stem + ".o")
        if not up_to_date(made, source):
            extra = target.sets.get(instruction_set(source) or "", [])
            command = [*common, *extra, "-MMD", "-c", str(source), "-o", str(made)]
            subprocess.run(command, check=True)
        return str(made)

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, [*sources, Path(__file__).with_suffix(".cpp")]))
    program = folder / "kernel_rows"
    subprocess.run([*common, *objects, "-o", str(program)], check=True)
    return program


def up_to_date(made: Path, source: Path) -> bool:
    listed = made.with_suffix(".d")
    if not (made.exists() and listed.exists()):
        return False
    read = shlex.split(listed.read_text().replace("\\\n", " ").partition(": ")[2])
    newest = max((os.path.getmtime(path) for path in read if os.path.exists(path)), default=0.0)
    return max(newest, source.stat().st_mtime) < made.stat().st_mtime


def run(name: str) -> subprocess.CompletedProcess[str]:
    """Runs all rows of a target; every one it names must have run and agreed."""
    target = TARGETS[name]
    rows = list(target.sets)
    if not target.run:  # this very machine: only what it has
        from paring.engine import _core

        rows = [row for row, supported in _core.kernels.rows() if supported and row in rows]
    command = [*target.run, str(build(name)), *rows]
    return subprocess.run(command, capture_output=True, text=True)


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    lacking = missing(sys.argv[1])
    if lacking:
        sys.exit(f"kernel_rows: {lacking}; see the head of {__file__}")
    done = run(sys.argv[1])
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
