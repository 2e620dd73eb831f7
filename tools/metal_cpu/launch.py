"""Loads the runtime and compiled kernels, and runs one launch. Mirrors runtime/runtime.h."""

from __future__ import annotations

import ctypes as c
import os
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from tools.metal_cpu import toolchain

MAX_REPORTS, MAX_BUFFERS, MAX_ARRAYS = 64, 48, 64


class CBuffer(c.Structure):
    _fields_ = (
        ("host", c.c_void_p),
        ("size", c.c_uint64),
        ("is_output", c.c_uint32),
        ("copy_in", c.c_uint32),
        ("base", c.c_void_p),
        ("loaded", c.c_uint64),
        ("stored", c.c_uint64),
        ("useful", c.c_uint64),
        ("lines", c.c_uint64),
        ("touched", c.c_uint64),
    )


class CReport(c.Structure):
    _fields_ = (
        ("kind", c.c_uint32),
        ("access", c.c_uint32),
        ("line", c.c_uint32),
        ("other_line", c.c_uint32),
        ("pc", c.c_uint64),
        ("other_pc", c.c_uint64),
        ("buffer", c.c_int32),
        ("size", c.c_uint32),
        ("offset", c.c_int64),
        ("group", c.c_uint32 * 3),
        ("thread", c.c_uint32),
        ("other_thread", c.c_uint32),
        ("count", c.c_uint32),
        ("text", c.c_char * 96),
    )


class CLaunch(c.Structure):
    _fields_ = (
        ("entry", c.c_void_p),
        ("buffers", c.c_void_p),
        ("n_buffers", c.c_uint32),
        ("check", c.c_uint32),
        ("grid", c.c_uint32 * 3),
        ("group", c.c_uint32 * 3),
        ("seed", c.c_uint64),
        ("n_workers", c.c_uint32),
        ("n_reports", c.c_uint32),
        ("n_sampled", c.c_uint64),
        ("reports", CReport * MAX_REPORTS),
        ("arrays", (c.c_char * 32) * MAX_ARRAYS),
        ("array_sizes", c.c_uint32 * MAX_ARRAYS),
    )


LOCK = threading.Lock()
"""Held from filling the launch structure to reading its reports."""


@cache
def runtime() -> Any:
    """The runtime's library; kernels loaded later find its functions and those of libm."""
    if sys.platform != "darwin":
        with suppress(OSError):  # musl has these functions in its C library
            c.CDLL("libm.so.6", mode=c.RTLD_GLOBAL)
    library = c.CDLL(str(toolchain.runtime_library()), mode=c.RTLD_GLOBAL)
    library.msl_run.argtypes = [c.c_void_p]
    library.msl_run.restype = None
    return library


@cache
def load(path: Path) -> int:
    """The address of a kernel's entry point. The library stays loaded."""
    runtime()
    library = c.CDLL(str(path), mode=os.RTLD_NOW)
    return c.cast(library.msl_entry, c.c_void_p).value or 0


@cache
def launch_structure() -> CLaunch:
    return CLaunch()
