"""Build of Paring: the repository root is the package `paring`, `cpp/` its extension.

Metadata lives in pyproject.toml; here is what it can't say. A source whose stem ends with the name
of an instruction set (`linear_avx2.cpp`) is compiled with that set's flags and all others with
none, so that one wheel runs on every CPU and `cpp/dispatch.cpp` picks a kernel row at run time.
Files that have not changed are not compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOMS = ("cli", "engine", "modifiers", "pipeline", "recipes", "zoo")
JOBS = 2
BASELINE = ("-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread")
# Python's own flags ask for debugging symbols, which make the library ten times larger.
SYMBOLS = () if "-g" in os.environ.get("CXXFLAGS", "").split() else ("-g0",)
WARNINGS = ("-Wall", "-Wextra")
# For tests/engine/sanitized_core.py: all of the core under the address and undefined sanitizers.
SANITIZE = os.environ.get("PARING_SANITIZE") == "1"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CHECKED = ("-O1", "-g1", *SANITIZERS) if SANITIZE else ()

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"),
    *("-mavx2", "-mfma", "-mf16c"),
)
# Suffix of a stem -> the architecture that has the instructions, the flags that turn them on.
INSTRUCTION_SETS = {
    "avx2": ("__x86_64__", AVX2),
    "avx512": ("__x86_64__", AVX512),
    "avx512_vnni": ("__x86_64__", (*AVX512, "-mavx512vnni")),
    "avx512_vbmi2": ("__x86_64__", (*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2")),
    "avxvnni": ("__x86_64__", (*AVX2, "-mavxvnni")),
    "neon": ("__aarch64__", ()),
    "neon_dotprod": ("__aarch64__", ("-march=armv8.2-a+dotprod",)),
}


def instruction_set(source: str) -> str | None:
    """Name of the instruction set a source is written for, or None for portable code."""
    stem = Path(source).stem
    fitting = [name for name in INSTRUCTION_SETS if stem.endswith("_" + name)]
    return max(fitting, key=len, default=None)


def up_to_date(target: Path, sources: list[str]) -> bool:
    """Whether an object is newer than the sources and the headers the compiler listed for it."""
    listed = target.with_suffix(".d")  # a rule for make: "object: source header \\ header"
    if not (target.exists() and listed.exists()):
        return False
    read = shlex.split(listed.read_text().replace("\\\n", " ").partition(": ")[2])
    made = target.stat().st_mtime
    return all(os.path.exists(path) and os.path.getmtime(path) < made for path in [*sources, *read])


class BuildModules(build_py):
    """Leaves this file out of the package whose folder it lies in."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, package_dir)
        return [entry for entry in found if entry[:2] != ("paring", "setup")]


class BuildKernels(build_ext):
    """Compiles changed sources in parallel, each with the flags of its instruction set."""

    def run(self) -> None:
        if self.editable_mode:  # setuptools gives it a temporary folder; keep objects for later
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = os.path.join("build", f"temp.{tag}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        needed = {name for source in ext.sources if (name := instruction_set(source))}
        known = {name for name in sorted(needed) if self.compiler_knows(name)}
        sources = [s for s in ext.sources if (instruction_set(s) or "") in known | {""}]
        ext.define_macros += [(f"PARING_HAVE_{name.upper()}", "1") for name in sorted(known)]
        os.makedirs(self.build_temp, exist_ok=True)
        # Two builds of one tree at once would write the same objects.
        with open(Path(self.build_temp, "lock"), "w") as lock, ThreadPoolExecutor(JOBS) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            objects = list(pool.map(lambda source: self.compile_source(ext, source), sources))
            self.compiler.link_shared_object(
                objects,
                self.get_ext_fullpath(ext.name),
                extra_postargs=["-pthread", *(SANITIZERS if SANITIZE else ())],
                target_lang="c++",
            )

    def compiler_knows(self, name: str) -> bool:
        """Whether the compiler targets the set's architecture and knows its flags."""
        architecture, flags = INSTRUCTION_SETS[name]
        probe = [*self.compiler.compiler_so_cxx, *flags, "-x", "c++", "-fsyntax-only", "-"]
        text = f"#ifndef {architecture}\n#error another architecture\n#endif\n"
        return subprocess.run(probe, input=text, text=True, capture_output=True).returncode == 0

    def compile_source(self, ext: Extension, source: str) -> str:
        """Object file of a source, compiled unless it is newer than all that was read for it."""
        name = instruction_set(source)
        flags = [*BASELINE, *SYMBOLS, *WARNINGS, *CHECKED]
        flags += INSTRUCTION_SETS[name][1] if name else ()
        command = [*self.compiler.compiler_so_cxx, *flags, repr(ext.define_macros)]
        # One folder per command line: changed flags or variables never meet old objects.
        folder = Path(self.build_temp, hashlib.sha256(repr(command).encode()).hexdigest()[:12])
        (target,) = self.compiler.object_filenames([source], output_dir=str(folder))
        if self.force or not up_to_date(Path(target), [source, *ext.depends]):
            self.compiler.compile(
                [source],
                output_dir=str(folder),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*flags, "-MMD"],
                depends=ext.depends,
            )
        return target

    def copy_file(self, infile: str, outfile: str, level: int = 1) -> None:
        """Copy into the tree by renaming: a running process keeps the library it has loaded."""
        fresh = f"{outfile}.{os.getpid()}"
        os.makedirs(os.path.dirname(outfile), exist_ok=True)
        shutil.copy2(infile, fresh)
        os.replace(fresh, outfile)


def files(*suffixes: str) -> list[str]:
    return sorted(str(path) for path in Path("cpp").rglob("*") if path.suffix in suffixes)


setup(
    package_dir={"paring": "."},
    packages=[
        "paring",
        *("paring." + name for name in find_packages(include=[*ROOMS, *(f"{r}.*" for r in ROOMS)])),
    ],
    # Else everything that MANIFEST.in names (tests, cpp) would be data of the root package.
    include_package_data=False,
    package_data={
        "paring": ["py.typed"],
        "paring.recipes": ["library/**/*.yaml"],
        "paring.zoo": ["cards/*.yaml"],
    },
    ext_modules=[
        Extension(
            "paring.engine._core",
            sources=files(".cpp"),
            depends=["setup.py"],
            include_dirs=["cpp", pybind11.get_include()],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildModules},
)
