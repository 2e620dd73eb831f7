"""The text that MLX generates around a kernel's body, and where its lines come from.

Follows MLX 0.32 (`mlx/backend/common/metal_kernel.cpp`, MIT); tests/metal_cpu compares the result
with what MLX prints, byte for byte. Knows nothing about compilers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
"""Attribute -> type, in MLX's order; one is a parameter if its name occurs in the body."""

TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "float16_t",
    "float32": "float",
    "bfloat16": "bfloat16_t",
    "complex64": "complex64_t",
}
"""Name of a dtype -> Metal type in MLX's preamble."""

SMALL = 8
"""Inputs with fewer elements are passed in the `constant` address space."""

TemplateValue: TypeAlias = "int | bool | str"
"""A number, or the name of a dtype."""


@dataclass(frozen=True)
class Argument:
    """What the signature depends on: an input's type name, size in elements, and dimensions."""

    dtype: str
    size: int
    ndim: int

    @property
    def suffix(self) -> str:
        """The part of the kernel's name that tells scalars and small inputs apart."""
        return "s" if self.ndim == 0 else "c" if self.size < SMALL else ""


@dataclass(frozen=True)
class Buffer:
    """One buffer parameter: `part` is "data", "shape", "strides" or "ndim" of `name`."""

    name: str
    part: str
    declaration: str
    is_output: bool = False


@dataclass(frozen=True)
class Signature:
    """One kernel with one set of argument types: everything MLX needs to write its text."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    atomic_outputs: bool
    inputs: tuple[Argument, ...]
    output_dtypes: tuple[str, ...]
    template: tuple[tuple[str, TemplateValue], ...]

    @cached_property
    def template_arguments(self) -> str:
        """`<bfloat16_t, 4, 1>`, or nothing."""
        values = [TYPES[v] if isinstance(v, str) else str(int(v)) for _, v in self.template]
        return f"<{', '.join(values)}>" if values else ""

    @cached_property
    def kernel_name(self) -> str:
        """The function's name: unique for the template and the argument types."""
        name = f"custom_kernel_{self.name}"
        if self.template:
            hashed = self.template_arguments.replace(", ", "_")
            for mark in "<>-":
                hashed = hashed.replace(mark, "_")
            name += "_" + hashed[:-1]
        name += "".join(f"_{TYPES[a.dtype]}{a.suffix}" for a in self.inputs)
        return name + "".join(f"_{TYPES[d]}" for d in self.output_dtypes)

    @cached_property
    def attributes(self) -> list[str]:
        return [name for name in ATTRIBUTES if name in self.source]

    @cached_property
    def buffers(self) -> list[Buffer]:
        found = []
        for name, argument in zip(self.input_names, self.inputs, strict=True):
            space = "constant" if argument.size < SMALL else "device"
            kind = TYPES[argument.dtype] + ("&" if argument.ndim == 0 else "*")
            found.append(Buffer(name, "data", f"const {space} {kind} {name}"))
            if argument.ndim == 0:
                continue
            for part, kind in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
                if f"{name}_{part}" in self.source:
                    found.append(Buffer(name, part, f"const constant {kind} {name}_{part}"))
        for name, dtype in zip(self.output_names, self.output_dtypes, strict=True):
            kind = f"atomic<{TYPES[dtype]}>" if self.atomic_outputs else TYPES[dtype]
            found.append(Buffer(name, "data", f"device {kind}* {name}", True))
        return found

    @cached_property
    def text(self) -> str:
        """The whole generated text, as MLX prints it."""
        name, args = self.kernel_name, self.template_arguments
        text = self._head + self._parameters + self.source + "\n}\n"
        if self.template:
            text += f'\ntemplate [[host_name("{name}")]] [[kernel]] '
            text += f"decltype({name}{args}) {name}{args};\n"
        return text

    @property
    def _template_line(self) -> str:
        if not self.template:
            return ""
        kinds = {bool: "bool", int: "int", str: "typename"}
        return f"template <{', '.join(f'{kinds[type(v)]} {n}' for n, v in self.template)}>\n"

    @cached_property
    def _parameters(self) -> str:
        """The parameter list up to the opening brace.

        MLX compares the index of the buffer with the number of inputs and outputs when it decides
        whether the list ends, although shapes, strides and ranks have buffers too. Without
        attributes and with several outputs it then ends more than once, here as there.
        """
        end, attributes = ") {\n", self.attributes
        last = len(self.inputs) + len(self.output_dtypes) - 1
        text = ""
        for i, buffer in enumerate(self.buffers):
            text += f"  {buffer.declaration} [[buffer({i})]]"
            text += end if buffer.is_output and i >= last and not attributes else ",\n"
        for name in attributes:
            text += f"  {ATTRIBUTES[name]} {name} [[{name}]]"
            text += end if name == attributes[-1] else ",\n"
        return text

    @property
    def _head(self) -> str:
        return f"{self.header}{self._template_line}[[kernel]] void {self.kernel_name}(\n"

    @cached_property
    def body_line(self) -> int:
        """Number of the line of the text that holds the body's first line."""
        return 1 + (self._head + self._parameters).count("\n")

    def place(self, line: int) -> str:
        """Where a line of the text stands: "body line 3" or "header line 12"."""
        n_body = self.source.count("\n") + 1
        if self.body_line <= line < self.body_line + n_body:
            return f"body line {line - self.body_line + 1}"
        if line <= len(self.header.splitlines()):
            return f"header line {line}"
        return "signature"

    def line_text(self, line: int) -> str:
        lines = self.text.split("\n")
        return lines[line - 1].strip() if 0 < line <= len(lines) else ""
