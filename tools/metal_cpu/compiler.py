"""A kernel's signature -> a library with one entry point, or errors in the kernel's own lines."""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tools.metal_cpu import toolchain
from tools.metal_cpu.lint import RewriteError
from tools.metal_cpu.report import ShaderError
from tools.metal_cpu.rewrite import rewrite
from tools.metal_cpu.source import ATTRIBUTES, Signature
from tools.metal_cpu.toolchain import CompilerError

FILE = "kernel"
"""What the compiler calls the generated text."""

# Metal converts to bfloat only where the text says so; clang does it anywhere and warns.
TO_BFLOAT = re.compile(r"warning: implicit conversion .* to '(__bf16|bfloat)'")
# Between half and bfloat clang refuses even where the text says so.
CAST = re.compile(
    FILE + r":(\d+):(\d+): error: (?:functional-style cast|static_cast) from '.* is not allowed"
)
WRITTEN_CAST = re.compile(r"static_cast<(.+?)>\(|([^(]+)\(")
ROUNDS = 20
"""Of repairs: clang stops at 8 errors, so a round mends at most that many."""

VALUES = {
    "dispatch_quadgroups_per_threadgroup": "(i->n_dispatch + 3) / 4",
    "dispatch_simdgroups_per_threadgroup": "(i->n_dispatch + 31) / 32",
    "dispatch_threads_per_threadgroup": "dispatch_threads",
    "grid_origin": "uint3(0)",
    "grid_size": "threads_per_grid",
    "quadgroup_index_in_threadgroup": "i->index / 4",
    "quadgroups_per_threadgroup": "(i->n_threads + 3) / 4",
    "simdgroup_index_in_threadgroup": "i->index / 32",
    "simdgroups_per_threadgroup": "(i->n_threads + 31) / 32",
    "thread_execution_width": "32",
    "thread_index_in_quadgroup": "i->index & 3",
    "thread_index_in_simdgroup": "i->index & 31",
    "thread_index_in_threadgroup": "i->index",
    "thread_position_in_grid": "position_in_grid",
    "thread_position_in_threadgroup": "position_in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup_position",
    "threadgroups_per_grid": "threadgroups_per_grid",
    "threads_per_grid": "threads_per_grid",
    "threads_per_simdgroup": "32",
    "threads_per_threadgroup": "threads_per_threadgroup",
}
"""Attribute -> the expression, or the field of msl_ids, that holds it."""


def entry_point(signature: Signature) -> str:
    """The function the runtime calls for every thread."""
    arguments = [f"msl_any{{b[{i}]}}" for i in range(len(signature.buffers))]
    for name in signature.attributes:
        value = VALUES[name]
        if ATTRIBUTES[name] == "uint3" and not value.startswith("uint3"):
            value = f"uint3(i->{value}[0], i->{value}[1], i->{value}[2])"
        arguments.append(value)
    call = f"{signature.kernel_name}{signature.template_arguments}({', '.join(arguments)})"
    return (
        '\n#line 1 "entry"\nextern "C" void msl_entry(device const ulong* b, '
        f"device const msl_ids* i) {{ {call}; }}\n"
    )


class Compilations:
    """Kernels being compiled in the background, and those this process has compiled."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._jobs: dict[str, Future[Path]] = {}
        self._modes: set[str] = set()

    def get(self, signature: Signature, mode: str) -> Path:
        """A kernel's library. Raises ShaderError with the kernel's lines.

        A process that has used both modes will want this kernel in the other mode too: that is
        compiled at the same time.
        """
        self._modes.add(mode)
        job = self._start(signature, mode)
        for other in self._modes - {mode}:
            self._start(signature, other)
        return job.result()

    def _start(self, signature: Signature, mode: str) -> Future[Path]:
        text = signature.text + entry_point(signature)
        key = hashlib.sha256((toolchain.sources_key() + mode + text).encode()).hexdigest()[:32]
        if key not in self._jobs:
            self._jobs[key] = self._pool.submit(compile_kernel, signature, mode, f"kernel-{key}.so")
        return self._jobs[key]


def compile_kernel(signature: Signature, mode: str, name: str) -> Path:
    """The library, from the cache or newly made. Raises ShaderError with the kernel's lines."""
    if not signature.text.isascii():
        raise ShaderError(f"{signature.name}: MLX hands sources to Metal as ASCII; this is not")

    def make(path: Path) -> None:
        source, made = path.with_suffix(".cl"), path.with_suffix(".o")
        flags = [*toolchain.target(), *toolchain.LANGUAGE, *toolchain.MODES[mode]]
        flags += ["-include-pch", str(toolchain.header(mode)), "-c", str(source), "-o", str(made)]
        source.write_text(f'#line 1 "{FILE}"\n{rewrite(signature.text)}{entry_point(signature)}')
        said = _compile(source, ["clang", "-x", "cl", *flags])
        if refused := [line for line in said.splitlines() if TO_BFLOAT.search(line)]:
            raise CompilerError("\n".join(dict.fromkeys(refused)).replace("warning:", "error:"))
        toolchain.link([made], path)

    try:
        return toolchain.cached(name, make)
    except RewriteError as exc:
        place, quoted = signature.place(exc.line), signature.line_text(exc.line)
        raise ShaderError(f"{signature.name}, {place}: {exc}\n    {quoted}") from exc
    except CompilerError as exc:
        raise compile_error(signature, str(exc)) from exc


def _compile(source: Path, command: list[str]) -> str:
    """Run the compiler, mending casts between half and bfloat; its messages."""
    for _ in range(ROUNDS):
        try:
            return toolchain.run(command)
        except CompilerError as exc:
            places = {(int(m[1]), int(m[2]) - 1) for m in CAST.finditer(str(exc))}
            if not places:
                raise
        lines = source.read_text().split("\n")  # the first is the #line directive
        for line, at in sorted(places, reverse=True):
            cast = WRITTEN_CAST.sub(r"msl_cast<\1\2>(", lines[line][at:], count=1)
            lines[line] = lines[line][:at] + cast
        source.write_text("\n".join(lines))
    return toolchain.run(command)


def compile_error(signature: Signature, message: str) -> ShaderError:
    """clang's errors, and its notes that point into the kernel, with the kernel's own lines."""
    lines: list[str] = []
    for text in message.splitlines():
        found = re.match(r"(\S+?):(\d+):\d+: (error|fatal error|note): (.*)", text)
        if not found or (found[3] == "note" and found[1] != FILE):
            continue
        said = f"{found[3]}: {found[4]}"
        if found[1] == FILE:
            line = int(found[2])
            said = f"{signature.place(line)}: {said}\n    {signature.line_text(line)}"
        lines.append(said)
    said = "\n".join(lines) or message
    return ShaderError(f"{signature.name} does not compile:\n{said}")
