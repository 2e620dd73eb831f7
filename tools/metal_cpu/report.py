"""What a launch found, in words: faults with kernel, line and buffer, and the counters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.metal_cpu.launch import CLaunch, CReport
    from tools.metal_cpu.source import Buffer, Signature

KINDS = (
    "",
    "out of bounds",
    "wild access",
    "stack overflow",
    "arithmetic fault",
    "divergence",
    "too much threadgroup memory",
    "failed check",
    "write past the end",
    "race",
    "race between threadgroups",
    "uninitialised read",
    "write to an input",
    "output never written",
    "index out of range",
    "misaligned access",
    "conversion out of range",
)
NO_BUFFER = 48


class ShaderError(RuntimeError):
    """A kernel does something wrong; `reports` holds every finding of the launch."""

    def __init__(self, message: str, reports: tuple[Report, ...] = ()):
        super().__init__(message)
        self.reports = reports


@dataclass(frozen=True)
class Report:
    """One finding. `kind` is one of KINDS, `place` is "body line 3", `buffer` the array's name."""

    kind: str
    place: str
    buffer: str
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Traffic:
    """What a launch did with one buffer, counted in check mode.

    loaded, stored: bytes, summed over threads. touched: distinct bytes of the whole launch. useful:
    distinct bytes, summed over the accesses of a simdgroup. lines: 128-byte lines, likewise.
    """

    loaded: int
    stored: int
    touched: int
    useful: int
    lines: int

    @property
    def efficiency(self) -> float:
        """The part of the touched lines' bytes that the simdgroups used, 0 to 1."""
        return self.useful / (128 * self.lines) if self.lines else 1.0


@dataclass(frozen=True)
class Launch:
    """The last launch: findings, and traffic by buffer name (check mode).

    threadgroup_bytes: size of the threadgroup arrays that were used, of 32,768.
    """

    kernel: str
    mode: str
    reports: tuple[Report, ...]
    traffic: dict[str, Traffic] = field(default_factory=dict)
    threadgroup_bytes: int = 0

    @property
    def loaded(self) -> int:
        """Bytes loaded from device memory, summed over threads and buffers."""
        return sum(t.loaded for t in self.traffic.values())

    @property
    def stored(self) -> int:
        """Bytes stored to device memory, likewise."""
        return sum(t.stored for t in self.traffic.values())

    @property
    def report(self) -> str:
        """All findings, one a line; empty if there are none."""
        return "\n".join(map(str, self.reports))


class Reader:
    """Turns the runtime's reports of one launch into sentences."""

    def __init__(self, signature: Signature, library: Path, launch: CLaunch, sizes: list[int]):
        self.signature, self.library, self.launch, self.sizes = signature, library, launch, sizes

    def read(self) -> tuple[Report, ...]:
        found = [self._read(self.launch.reports[i]) for i in range(self.launch.n_reports)]
        return tuple({r.message.partition("; threadgroup")[0]: r for r in reversed(found)}.values())

    def _line(self, line: int, pc: int) -> int:
        """The line of the text, from an address in the library if the runtime did not know it."""
        if line or not pc:
            return line
        from tools.metal_cpu.lines import line_of  # slow to import, and wanted after a fault only

        return line_of(self.library, pc)

    def _place(self, line: int, pc: int) -> str:
        line = self._line(line, pc)
        return self.signature.place(line) if line else ""

    def _quote(self, line: int, pc: int) -> str:
        line = self._line(line, pc)
        if not line:
            return ""
        return f", {self.signature.place(line)}: `{self.signature.line_text(line)}`"

    def _buffer(self, r: CReport) -> tuple[str, str]:
        """Name, and description with size."""
        if r.buffer == NO_BUFFER:
            return "", ""
        if r.buffer < 0:
            name = self.launch.arrays[-1 - r.buffer].value.decode()
            size = self.launch.array_sizes[-1 - r.buffer]
            return name, f"threadgroup array '{name}' ({size} bytes)"
        buffer: Buffer = self.signature.buffers[r.buffer]
        part = "" if buffer.part == "data" else f"_{buffer.part}"
        kind = "output" if buffer.is_output else "input"
        return buffer.name, f"{kind} '{buffer.name}{part}' ({self.sizes[r.buffer]} bytes)"

    def _read(self, r: CReport) -> Report:
        kind = KINDS[r.kind]
        name, described = self._buffer(r)
        access = "write" if r.access else "read"
        text = r.text.decode()
        quote = self._quote(r.line, r.pc)
        at = f"; threadgroup {tuple(r.group)}, thread {r.thread}"
        of = f"{access} of {r.size} bytes" if r.size else access
        if kind == "out of bounds":
            body = f"{of} at byte {r.offset} of {described}{quote}{at}"
        elif kind == "write past the end":
            body = f"of {described}: byte {r.offset} was changed"
        elif kind == "wild access":
            body = f"{of} at address {r.offset:#x}, which belongs to no buffer{quote}{at}"
        elif kind == "divergence":
            body = self._divergence(r, text)
        elif kind == "too much threadgroup memory":
            body = f"{r.size} bytes with array '{text}', Metal's limit is 32768{quote}"
            name = text
        elif kind == "failed check":
            body = f"{text}{quote}{at}"
        elif kind.startswith("race"):
            other = self._quote(r.other_line, r.other_pc)
            where = " of another" if kind == "race between threadgroups" else ""
            body = (
                f"on byte {r.offset} of {described}: {access} by thread {r.thread}{quote} and "
                f"{text} by thread {r.other_thread}{where}{other}; threadgroup {tuple(r.group)}"
            )
        elif kind == "index out of range":
            body = f"index {r.offset} of {text or 'an array'}{quote}{at}"
            name = self._indexed(r)
        elif kind == "misaligned access":
            body = f"an address that is {r.offset} mod 256 for {text}{quote}{at}"
        elif kind == "conversion out of range":
            body = f"a float to {text}{quote}{at}"
        elif kind == "output never written":
            body = f"{described}: {r.size} bytes, the first is byte {r.offset}"
        elif described:
            body = f"{of} at byte {r.offset} of {described}{quote}{at}"
        else:
            body = f"{text or 'in the kernel'}{quote}{at}"
        message = f"{self.signature.name}: {kind}: {body}"
        return Report(kind, self._place(r.line, r.pc), name, message)

    def _indexed(self, r: CReport) -> str:
        """The array in the line whose index is nearest to the column (r.size) of the fault."""
        line = self._line(r.line, r.pc)
        text = self.signature.text.split("\n")[line - 1] if line else ""
        found = re.finditer(r"(\w+)\s*\[", text)
        return min(found, key=lambda m: abs(m.start() + 1 - r.size), default=["", ""])[1]

    def _divergence(self, r: CReport, text: str) -> str:
        here, _, there = text.partition("|")
        other = self._quote(r.other_line, 0)
        return (
            f"thread {r.thread} is at {here}{self._quote(r.line, 0)} while thread {r.other_thread} "
            f"is at {there}{other}; threadgroup {tuple(r.group)}"
        )
