"""Addresses in a compiled kernel -> lines of its text, from the library's DWARF tables.

Code inlined from the shader header is given the line of the kernel that called it.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.dwarf.ranges import RangeEntry
from elftools.elf.elffile import ELFFile

KERNEL = b"kernel"
"""What the compiler calls the kernel's text."""


class LineTable:
    def __init__(self, library: Path):
        self.rows: list[tuple[int, int]] = []
        """Address, and the kernel's line from there on; 0: another file's."""
        self.calls: list[tuple[int, int, int]] = []
        """First address, end, line: code inlined into that line of the kernel."""
        with library.open("rb") as file:
            elf = ELFFile(file)
            dwarf: Any = elf.get_dwarf_info() if elf.has_dwarf_info() else None
            for unit in dwarf.iter_CUs() if dwarf else ():
                self._read(dwarf, unit)
        self.rows.sort()
        self.calls.sort(key=lambda call: call[1] - call[0])
        self.addresses = [address for address, _ in self.rows]

    def _read(self, dwarf: Any, unit: Any) -> None:
        program = dwarf.line_program_for_CU(unit)
        if program is None:
            return
        first = 0 if program.header["version"] >= 5 else 1
        own = [entry.name.endswith(KERNEL) for entry in program.header["file_entry"]]
        for entry in program.get_entries():
            if (state := entry.state) is not None:
                line = 0 if state.end_sequence or not own[state.file - first] else state.line
                self.rows.append((state.address, line))
        for die in unit.iter_DIEs():
            call = die.attributes.get("DW_AT_call_file")
            if die.tag == "DW_TAG_inlined_subroutine" and call and own[call.value - first]:
                line = die.attributes["DW_AT_call_line"].value
                self.calls += [(low, high, line) for low, high in _extent(dwarf, unit, die)]

    def line(self, address: int) -> int:
        """The kernel's line that the code at an address stands for; 0: none."""
        at = bisect_right(self.addresses, address) - 1
        if at >= 0 and self.rows[at][1]:
            return self.rows[at][1]
        return next((line for low, high, line in self.calls if low <= address < high), 0)


def _extent(dwarf: Any, unit: Any, die: Any) -> list[tuple[int, int]]:
    """The address ranges of an inlined call."""
    if "DW_AT_ranges" in die.attributes:
        entries = dwarf.range_lists().get_range_list_at_offset(
            die.attributes["DW_AT_ranges"].value, cu=unit
        )
        base = unit.get_top_DIE().attributes["DW_AT_low_pc"].value
        return [
            (e.begin_offset, e.end_offset)
            if e.is_absolute
            else (base + e.begin_offset, base + e.end_offset)
            for e in entries
            if isinstance(e, RangeEntry)
        ]
    if "DW_AT_low_pc" not in die.attributes:
        return []
    low, high = die.attributes["DW_AT_low_pc"].value, die.attributes["DW_AT_high_pc"]
    return [(low, high.value + (0 if high.form == "DW_FORM_addr" else low))]


@cache
def line_table(library: Path) -> LineTable | None:
    """The table of a library; None where it has no ELF tables, as on macOS."""
    try:
        return LineTable(library)
    except ELFError:
        return None


def line_of(library: Path, address: int) -> int:
    table = line_table(library)
    return table.line(address) if table else 0
