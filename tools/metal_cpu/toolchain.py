"""clang from the `ziglang` wheel, and the folder where what it makes is kept.

Results lie in the user's cache directory under a hash of everything they depend on, so a second run
compiles nothing. The runtime and the precompiled header are made here, kernels in compiler.py.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata, util
from pathlib import Path

HERE = Path(__file__).resolve().parent
MSL = HERE / "msl"
RUNTIME = HERE / "runtime"

LANGUAGE = (
    "-cl-std=CLC++2021 -cl-no-stdinc -cl-single-precision-constant -fno-math-errno "
    "-Xclang -cl-ext=+cl_khr_fp16,+__cl_clang_function_pointers,+__cl_clang_bitfields,"
    "+__opencl_c_generic_address_space,+__opencl_c_program_scope_global_variables,"
    "+__opencl_c_int64 "
    "-Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none "
    "-ffp-contract=off -fno-strict-aliasing -fPIC -ferror-limit=8 -Wno-duplicate-decl-specifier "
    "-Werror=uninitialized -Werror=return-type -Wimplicit-float-conversion -Wno-unused-value "
    "-Wno-psabi -fno-color-diagnostics -fno-caret-diagnostics"
).split()
MODES = {
    "fast": "-O1 -gline-tables-only".split(),
    "check": (
        "-O1 -gline-tables-only -fsanitize=thread -mllvm -tsan-instrument-func-entry-exit=0 "
        "-mllvm -tsan-instrument-read-before-write=1 "
        "-fsanitize=array-bounds,local-bounds,integer-divide-by-zero,alignment,"
        "float-cast-overflow "
        "-fno-sanitize-recover=all -fno-sanitize-trap=all -ftrivial-auto-var-init=pattern "
        "-DMSL_CHECK"
    ).split(),
}
KEEP_SECONDS = 30 * 24 * 3600
NO_TIMES = ["-Xclang", "-fno-pch-timestamp"]
RUNTIME_FLAGS = (
    "-std=c++17 -O2 -fPIC -ffp-contract=off -fno-exceptions -fno-rtti -fno-sanitize=all "
    "-fno-stack-protector"
).split()


class CompilerError(RuntimeError):
    """clang refused a text, or is missing."""


@cache
def zig() -> str:
    """Path of the zig binary, which holds clang and the linker. Raises CompilerError."""
    spec = util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        raise CompilerError(
            "tools/metal_cpu compiles shaders with clang from the package 'ziglang', which is not "
            "installed; run: pip install 'ds4py[shaders]' (in a checkout: pip install '.[shaders]')"
        )
    return str(Path(spec.submodule_search_locations[0]) / "zig")


@cache
def target() -> tuple[str, ...]:
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    if machine not in ("x86_64", "aarch64"):
        raise CompilerError(f"tools/metal_cpu runs on x86-64 and aarch64, not on {machine}")
    if sys.platform == "darwin":
        return ("-target", f"{machine.replace('aarch64', 'arm64')}-apple-macos13")
    flags = ("-target", f"{machine}-linux-gnu")
    return (*flags, "-march=x86-64-v3") if machine == "x86_64" else flags


@cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: a folder that may be deleted at any time."""
    home = Path.home()
    base = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    folder = Path(os.environ.get("XDG_CACHE_HOME", base)) / "ds4py" / "metal_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def sources_key() -> str:
    """Hash of the compiler and of everything here that has a say in what it makes."""
    zig()  # says what to install if it is missing
    digest = hashlib.sha256(metadata.version("ziglang").encode())
    digest.update(repr((LANGUAGE, MODES, RUNTIME_FLAGS, target())).encode())
    own = [HERE / f"{name}.py" for name in ("compiler", "lint", "rewrite", "toolchain")]
    for path in [*sorted(MSL.iterdir()), *sorted(RUNTIME.iterdir()), *own]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def run(arguments: Sequence[str], text: str | None = None) -> str:
    """Run zig; its messages. Raises CompilerError with them if it fails."""
    folder = str(cache_folder() / "zig")
    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}
    done = subprocess.run(
        [zig(), *arguments], input=text, text=True, capture_output=True, env=env, check=False
    )
    if done.returncode:
        raise CompilerError(done.stderr.strip() or f"zig {arguments[0]} failed")
    return done.stderr


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """A file of the cache, made in a temporary folder beside it and renamed when complete."""
    path = cache_folder() / name
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = Path(folder) / name
            make(made)
            try:
                made.rename(path)
            except OSError:  # a folder that another process has put there meanwhile
                if not path.exists():
                    raise
    return path


def remove_old() -> None:
    """Forget what was made weeks ago; done when something here has changed, so kernels have too."""
    for path in cache_folder().iterdir():
        if path.name.partition("-")[0] in ("kernel", "header", "runtime", "msl") and (
            time.time() - path.stat().st_mtime > KEEP_SECONDS
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def link(objects: Sequence[Path], library: Path) -> None:
    if sys.platform == "darwin":
        names = [str(o) for o in objects]
        run(["cc", "-shared", "-undefined", "dynamic_lookup", *names, "-o", str(library)])
    else:
        run(["ld.lld", "-shared", *(str(o) for o in objects), "-o", str(library)])


def runtime_library() -> Path:
    """The scheduler and the checker, compiled for this machine."""

    def make(path: Path) -> None:
        remove_old()
        objects = []
        x86 = "-march=x86-64-v3" in target()
        flags = [*RUNTIME_FLAGS, *(["-march=x86_64_v3"] if x86 else [])]  # zig's spelling
        for source in sorted(RUNTIME.glob("*.cpp")):
            objects.append(path.with_name(source.stem + ".o"))
            run(["cc", *flags, "-c", str(source), "-o", str(objects[-1])])
        link(objects, path)

    return cached(f"runtime-{sources_key()[:24]}.so", make)


def header(mode: str) -> Path:
    """The shader header, precompiled. It refers to its source files: those are kept beside it."""
    key = sources_key()[:24]

    def copy(path: Path) -> None:
        shutil.copytree(MSL, path)
        # A file that only includes the header: a main file cannot be a system header.
        (path / "all.h").write_text('#include "msl.h"\n')

    def make(path: Path) -> None:
        source = cached(f"msl-{key}", copy) / "all.h"
        flags = [*target(), *LANGUAGE, *MODES[mode], "-Xclang", "-emit-pch"]
        run(["clang", "-x", "cl", *flags, *NO_TIMES, "-c", str(source), "-o", str(path)])

    return cached(f"header-{mode}-{key}.pch", make)
