"""Runs C++ where the Python tests can't go: every kernel row against `reference`, and the ops rows against each other.

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
    "here": Target("g++", ["-O2"], {}),
    "race": Target("g++", ["-O1", "-g1", "-fsanitize=thread", "-Wno-tsan"], {}),
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
PROGRAMS = {  # beside this file -> what it is linked with
    "kernel_rows": ("cpp/kernels/*.cpp", "cpp/dispatch.cpp"),
    "ops_digest": ("cpp/ops/ops_*.cpp",),
    "pool_stress": ("cpp/threads.cpp", "cpp/kernels/memory.cpp", "cpp/kernels/packed.cpp"),
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


def build(name: str, program: str) -> Path:
    """A program of PROGRAMS for a target, in build/; only what changed is compiled."""
    target, folder = TARGETS[name], ROOT / "build" / f"{program}_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [path for pattern in PROGRAMS[program] for path in ROOT.glob(pattern)]
    sources = [s for s in sources if (instruction_set(s) or "") in {"", *target.sets}]
    common = [target.compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    common += ["-pthread", *target.flags, f"-I{ROOT / 'cpp'}"]
    common += [f"-DPARING_HAVE_{known.upper()}=1" for known in target.sets]

    def compile_one(source: Path) -> str:
        made = folder / (source.stem + ".o")
        if not up_to_date(made, source):
            extra = target.sets.get(instruction_set(source) or "", [])
            command = [*common, *extra, "-MMD", "-c", str(source), "-o", str(made)]
            subprocess.run(command, check=True)
        return str(made)

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(
            pool.map(compile_one, [*sources, Path(__file__).with_name(f"{program}.cpp")])
        )
    made = folder / program
    subprocess.run([*common, *objects, "-o", str(made)], check=True)
    return made


def up_to_date(made: Path, source: Path) -> bool:
    listed = made.with_suffix(".d")
    if not (made.exists() and listed.exists()):
        return False
    read = shlex.split(listed.read_text().replace("\\\n", " ").partition(": ")[2])
    newest = max((os.path.getmtime(path) for path in read if os.path.exists(path)), default=0.0)
    return max(newest, source.stat().st_mtime) < made.stat().st_mtime


def rows(name: str) -> list[str]:
    """Of a target, those that can run: of this very machine only what it has."""
    found = list(TARGETS[name].sets)
    if not TARGETS[name].run:
        from paring.engine import _core

        found = [row for row, supported in _core.kernels.rows() if supported and row in found]
    return found


def run(name: str) -> subprocess.CompletedProcess[str]:
    """Runs all rows of a target; every one it names must have run and agreed."""
    command = [*TARGETS[name].run, str(build(name, "kernel_rows")), *rows(name)]
    return subprocess.run(command, capture_output=True, text=True)


def digests(name: str) -> dict[str, str]:
    """What the ops rows of a target print, by row, and that of a plain build for this machine."""
    found = {}
    ops = ["portable", *(row for row in rows(name) if row in ("avx2", "avx512", "avx512_vnni"))]
    for target, names in ((name, ops), ("here", ["portable"])):
        program = str(build(target, "ops_digest"))
        for row in names:
            done = subprocess.run(
                [*TARGETS[target].run, program, row], capture_output=True, text=True, check=True
            )
            found[f"{row}, {target}"] = done.stdout
    return found


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in ("arm", "sanitize"):
        sys.exit(__doc__)
    lacking = missing(sys.argv[1])
    if lacking:
        sys.exit(f"kernel_rows: {lacking}; see the head of {__file__}")
    done = run(sys.argv[1])
    print(done.stdout + done.stderr, end="")
    found = digests(sys.argv[1])
    print(f"ops: {', '.join(found)}: {'equal' if len(set(found.values())) == 1 else 'DIFFERENT'}")
    return done.returncode or len(set(found.values())) != 1


if __name__ == "__main__":
    sys.exit(main())
