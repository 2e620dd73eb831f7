"""The only place that asks what the machine can do, and the one door to the Metal kernels.

A kernel is `metal/<name>.metal`: two lines that name its inputs and outputs, helper functions with
`#include`s of `metal/include/`, and after the line `// body` the body of the kernel function, for
which MLX writes the signature. Launching is lazy like any MLX operation.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple, TypeAlias, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py import assets
from ds4py.errors import KernelError, OptionsError
from ds4py.kernels.host import HostOps
from ds4py.kernels.ops import Array, Dtype, MlxOps, Ops

MLX_VERSION = metadata.version("mlx")
KERNELS = ("auto", "metal", "reference")
PAGE_BYTES = 16384
"""Of Apple Silicon."""
SMALL = 8
"""MLX hands inputs with fewer elements to a kernel in the `constant` address space."""

Template: TypeAlias = Sequence[tuple[str, "int | bool | Dtype"]]
Grid: TypeAlias = tuple[int, int, int]
"""Threads, not threadgroups; the last threadgroup of an axis may be a part of one."""
Output: TypeAlias = tuple[tuple[int, ...], Dtype]
"""Shape and type."""
Kernel: TypeAlias = Callable[..., list[Array]]
Make: TypeAlias = Callable[..., Kernel]
"""What `mx.fast.metal_kernel` is: names and text -> a function that launches."""


METAL_KERNEL = cast(Make, mx.fast.metal_kernel)  # MLX's own signature is narrower than its use


@dataclass(frozen=True)
class KernelText:
    """One file of `metal/`, its includes resolved."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    """Everything before the body: helper functions and tables."""
    body: str


def stripped(text: str) -> str:
    """Without comments, indentation and empty lines.

    MLX copies a kernel's text for every launch but those it replays, and keeps the copies.
    """
    lines = (re.sub(r"\s*//.*$", "", line).strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def parse_kernel(name: str, text: str, include: Callable[[str], str]) -> KernelText:
    """A kernel's text from its file's; `include` reads a file of `metal/include/`.

    Raises KernelError saying what is wrong with the file.
    """
    found = re.match(r"// inputs:(.*)\n// outputs:(.*)\n", text)
    head, mark, body = text.partition("\n// body\n")
    if not found or not mark or not found[2].split():
        raise KernelError(
            f"metal/{name}.metal must begin with '// inputs: ...' and '// outputs: ...' and have a "
            "line '// body' before the kernel's body"
        )
    header = _resolve(head[found.end() :] + "\n", include, set())
    return KernelText(name, tuple(found[1].split()), tuple(found[2].split()), header, body)


def _resolve(text: str, include: Callable[[str], str], seen: set[str]) -> str:
    """Put files in place of the `#include` lines that name them, each file once."""

    def replace(line: re.Match[str]) -> str:
        if line[1] in seen:
            return ""
        seen.add(line[1])
        return _resolve(include(line[1]), include, seen)

    return re.sub(r'^#include "([^"]+)"\n', replace, text, flags=re.MULTILINE)


@cache
def read_kernel(name: str) -> KernelText:
    """`metal/<name>.metal`. Raises KernelError."""
    return parse_kernel(name, _read(f"{name}.metal"), lambda file: _read(f"include/{file}"))


def _read(name: str) -> str:
    path = assets.path("metal", *name.split("/"))
    try:
        return path.read_text(encoding="ascii")  # MLX hands it to Metal as ASCII
    except (OSError, UnicodeDecodeError) as exc:
        raise KernelError(f"{path} is not readable as ASCII text ({exc})") from exc


MOST_PIECES = 4096
"""Pieces kept, of one to six launches and some 20 KB of text each; eight sequences at once have
2,700 in turn."""


@dataclass
class _Piece:
    """A part of a step that was launched before."""

    function: Callable[..., Any] | None = None
    """What MLX recorded: the same launches for other arrays."""
    launches: Counter[str] = field(default_factory=Counter)
    """Of one use."""
    n_uses: int = 0

    @property
    def total(self) -> Counter[str]:
        """Launches of all uses."""
        return Counter({name: n * self.n_uses for name, n in self.launches.items()})


class Launcher:
    """Launches kernels by name and counts them."""

    def __init__(
        self,
        make: Make = METAL_KERNEL,
        finish: Callable[[list[Array]], Any] | None = None,
        read: Callable[[str], KernelText] = read_kernel,
        adopt: Callable[[npt.NDArray[Any]], mx.array] = mx.array,
        strip: bool = True,
        lazy: bool = False,
    ):
        """make: builds a kernel, once per name. finish: waits for the outputs of the first launch
        of every variant, so that a text that does not compile is reported by name instead of in
        the evaluation of a whole step; None: never wait. read: finds a kernel's text. adopt: host
        memory -> a device array. strip: hand over texts `stripped`, not line by line as written.
        lazy: whether launches are MLX's own, which do nothing yet and so can be replayed."""
        self._make, self._finish, self._read = make, finish, read
        self.adopt, self._strip, self._lazy = adopt, strip, lazy
        self._kernels: dict[str, Kernel] = {}
        self._pieces: dict[Hashable, _Piece] = {}
        self._run: Callable[..., Any] | None = None  # of the piece that is being replayed
        self._tracing = False
        self._finished: set[Any] = set()
        self._launched: Counter[str] = Counter()  # one by one
        self.plain: Counter[str] = Counter()
        """How often something was computed with MLX's operations instead of kernels, by name."""

    @property
    def counters(self) -> Counter[str]:
        """Launches by kernel name."""
        return sum((piece.total for piece in self._pieces.values()), self._launched)

    def stats(self) -> dict[str, Any]:
        """Counters for people and scripts."""
        return {"launches": dict(self.counters), "plain": dict(self.plain)}

    def launch(
        self,
        name: str,
        inputs: Sequence[Array],
        template: Template,
        grid: Grid,
        threadgroup: Grid,
        outputs: Sequence[Output],
    ) -> list[Array]:
        """One launch of `metal/<name>.metal`. Raises KernelError.

        Inputs must be row-contiguous: the kernel gets them as they lie, without a copy.
        """
        kernel = self._kernels.get(name)
        if kernel is None:
            kernel = self._kernels[name] = self._build(name)
        self._launched[name] += 1
        how = {
            "template": template,
            "grid": grid,
            "threadgroup": threadgroup,
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
        }
        if self._finish is None or self._tracing:
            return kernel(inputs=inputs, **how)
        types = tuple((x.dtype, x.size < SMALL) for x in inputs)
        variant = (name, tuple(template), types)
        if variant in self._finished:
            return kernel(inputs=inputs, **how)
        try:
            made = kernel(inputs=inputs, **how)
            self._finish(made)
        except (RuntimeError, ValueError) as exc:
            raise KernelError(
                f"the Metal kernel {name} does not run with MLX {MLX_VERSION} on macOS "
                f"{platform.mac_ver()[0] or 'none'}; --kernels reference does without it ({exc})"
            ) from exc
        self._finished.add(variant)
        return made

    def replay(
        self, key: Hashable | None, arrays: Sequence[Any], run: Callable[..., Sequence[Any]]
    ) -> Sequence[Any]:
        """`run(*arrays)`, without running it from the third time on, but for key None.

        For steps, whose hundreds of launches differ from those of the step before in their inputs
        alone. The second time MLX records the launches in a function of its own; replaying that
        takes a tenth of the time, because it copies no kernel's text. Whatever `run` hands to its
        launches besides `arrays`, grids and templates too, must follow from `key`, and lives as
        long as the record: weights do, a sequence's rows must be among the arrays. The first time
        `run` runs as it is, so that kernels that do not compile are named.

        arrays: arrays or tuples of them, or None; so is what `run` returns.
        """
        if key is None or not self._lazy:
            return run(*arrays)
        piece = self._pieces.pop(key, None)
        if piece is None:
            made = run(*arrays)
            self._pieces[key] = _Piece()
            if len(self._pieces) > MOST_PIECES:
                self._forget(next(iter(self._pieces)))
            return made
        self._pieces[key] = piece  # behind all others: the first was used longest ago
        if piece.function is None:
            piece.function = self._recorded(piece)
        piece.n_uses += 1
        self._run = run
        try:
            return cast(Sequence[Any], piece.function(*arrays))
        finally:
            self._run = None  # it may hold a sequence's arrays

    def _recorded(self, piece: _Piece) -> Callable[..., Any]:
        """A function that launches what `_run` does. MLX calls it for new shapes of arrays only."""

        def record(*arrays: Any) -> Any:
            assert self._run is not None
            before, self._tracing = self._launched.copy(), True
            try:
                return self._run(*arrays)
            finally:
                piece.launches = self._launched - before
                self._launched, self._tracing = before, False

        return mx.compile(record)

    def _forget(self, key: Hashable) -> None:
        piece = self._pieces.pop(key)
        self._launched += piece.total

    def _build(self, name: str) -> Kernel:
        text = self._read(name)
        return self._make(
            name=name,
            input_names=list(text.inputs),
            output_names=list(text.outputs),
            header=stripped(text.header) if self._strip else text.header,
            source=stripped(text.body) if self._strip else text.body,
            ensure_row_contiguous=False,
        )


def metal_available() -> bool:
    """Whether MLX runs on an Apple GPU here."""
    return bool(mx.metal.is_available())


def metal_launcher() -> Launcher:
    """Kernels on this machine's GPU. Raises OptionsError where there is none."""
    if not metal_available():
        raise OptionsError(
            "kernels is 'metal', but MLX sees no Metal device here "
            f"(MLX {MLX_VERSION} on {platform.system()}); use 'reference', or 'auto', which "
            "takes Metal where it is"
        )
    return Launcher(finish=mx.eval, adopt=adopt, lazy=True)


def adopt(host: npt.NDArray[Any]) -> mx.array:
    """Host memory as a GPU's, without a copy where it is whole pages, as a bundle's records are."""
    if host.ctypes.data % PAGE_BYTES or host.nbytes % PAGE_BYTES or not host.flags.c_contiguous:
        return mx.array(host)
    try:
        return mx.asarray(host, copy=False)
    except (RuntimeError, ValueError):  # MLX's CPU back end adopts nothing
        return mx.array(host)


class Choice(NamedTuple):
    """What a model runs on."""

    ops: Ops
    dtype: Dtype
    """Of activations."""
    launcher: Launcher | None
    """Runs the Metal kernels; None: plain operations everywhere."""


def choose(kernels: str, dtype: str, launcher: Launcher | None = None) -> Choice:
    """Operations, activation type and kernels for two options. Raises OptionsError.

    kernels: "reference" is MLX's operations everywhere; "auto" is our kernels on a GPU and numpy on
    a CPU; "metal" is our kernels, with `launcher` where there is no GPU. dtype: "auto" is bfloat16
    on a GPU and float32 on a CPU; numpy has no bfloat16, so asking for it on a CPU means MLX.
    Asking for float32 by name on a CPU means results good to float32: sums are taken in float64, at
    half the speed, because the trained rounding of rows turns the last bit of a float32 sum into a
    visible step wherever a value sits on a rounding boundary.
    """
    if kernels not in KERNELS:
        raise OptionsError(f"kernels is {kernels!r}; need one of {', '.join(KERNELS)}")
    if launcher is None and (kernels == "metal" or (kernels == "auto" and metal_available())):
        launcher = metal_launcher()
    if launcher is not None or kernels == "reference" or dtype == "bfloat16":
        wanted = {"auto": "bfloat16" if metal_available() else "float32"}.get(dtype, dtype)
        gather = None if metal_available() else mx.float32  # its CPU back end gathers no other
        return Choice(cast(Ops, MlxOps(gather)), getattr(mx, wanted), launcher)
    ops = HostOps(np.float64 if dtype == "float32" else np.float32)
    # The libraries' own signatures say more than Ops does.
    return Choice(cast(Ops, ops), ops.wide, None)
