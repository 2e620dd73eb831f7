"""Metal source -> source for clang's C++ for OpenCL, token by token, every token on its own line.

Needed because the two languages differ in a few places only: where threadgroup variables may stand,
attributes, literals, and OpenCL's own keywords. House rules of the kernels are checked on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tools.metal_cpu.lint import RewriteError, Token, lint

TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+|\\\n)
      | (?P<newline>\n)
      | (?P<comment>//[^\n]*|/\*.*?\*/)
      | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<number>\.?[0-9](?:[eEpP][+-]|[0-9A-Za-z_.'])*)
      | (?P<name>[A-Za-z_][A-Za-z_0-9]*)
      | (?P<mark>\[\[|\]\]|::|<<=|>>=|->|\+\+|--|&&|\|\||[<>=!+\-*/%&|^]=|.)""",
    re.VERBOSE | re.DOTALL,
)
FLOAT = re.compile(
    r"0[xX][0-9a-fA-F.]+[pP][+-]?[0-9]+|[0-9]*\.[0-9]*(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+"
)
OPENCL_KEYWORDS = {
    "local", "global", "private", "generic", "kernel", "pipe", "uniform",
    "read_only", "write_only", "read_write", "__local", "__global", "__private", "__generic",
}  # fmt: skip


def tokens(text: str) -> Iterator[Token]:
    line = 1
    for match in TOKEN.finditer(text):
        kind = match.lastgroup or "mark"
        yield Token(kind, match[0], line)
        line += match[0].count("\n")


def rewrite(text: str) -> str:
    """The text for clang. Raises RewriteError."""
    return Rewriter(text).run()


class Rewriter:
    def __init__(self, text: str):
        self.tokens = list(tokens(text))
        self.classes = set(re.findall(r"\b(?:struct|class)\s+(\w+)", text))
        self.at = 0
        self.out: list[str] = []
        self.n_arrays = 0
        self.depth = 0  # of braces
        self.in_kernel = False  # from [[kernel]] to the end of that function

    def run(self) -> str:
        lint(self._code())
        while self.at < len(self.tokens):
            self._step(self.tokens[self.at])
        return "".join(self.out)

    def _code(self) -> list[Token]:
        """The tokens without space, comments and directives."""
        code: list[Token] = []
        directive = False
        for i, token in enumerate(self.tokens):
            self.at = i
            directive = token.kind != "newline" and (
                directive or (token.text == "#" and self._starts_line())
            )
            if not directive and token.kind not in ("space", "newline", "comment"):
                code.append(token)
        self.at = 0
        return code

    def _step(self, token: Token) -> None:
        if token.kind == "mark" and token.text == "#" and self._starts_line():
            self._directive()
        elif token.text == "[[":
            self._skip_attribute()
        elif token.kind == "number":
            self._emit(literal(token.text))
        elif token.text in ("threadgroup", "alignas") and self._declares_array():
            self._threadgroup_array(token)
        elif token.text == "thread" and self._qualifies_constructor():
            self._emit("")
        elif token.text == "template" and self._text_from(self.at, 2) == ["template", "[["]:
            self._skip_statement()
        elif token.kind == "name" and token.text in OPENCL_KEYWORDS:
            self._emit(token.text + "_")
        else:
            self.depth += (token.text == "{") - (token.text == "}")
            self.in_kernel &= self.depth > 0 or token.text != "}"
            self._emit(token.text)

    def _emit(self, text: str) -> None:
        self.out.append(text)
        self.at += 1

    def _starts_line(self) -> bool:
        before = self.at - 1
        while before >= 0 and self.tokens[before].kind in ("space", "comment"):
            before -= 1
        return before < 0 or self.tokens[before].kind == "newline"

    def _directive(self) -> None:
        """`#include <metal_...>` and `#pragma` of Metal go; other directives stay as they are."""
        end = self.at
        while end < len(self.tokens) and self.tokens[end].kind != "newline":
            end += 1
        words = [t.text for t in self.tokens[self.at : end] if t.kind in ("name", "mark")]
        if words[1:2] == ["include"] or words[1:3] == ["pragma", "METAL"]:
            self.at = end
        else:
            self._emit("#")

    def _skip_attribute(self) -> None:
        while self.tokens[self.at].text != "]]":
            self.in_kernel |= self.tokens[self.at].text == "kernel"
            self._emit("\n" if self.tokens[self.at].kind == "newline" else "")
        self._emit("")

    def _skip_statement(self) -> None:
        """The explicit instantiation at the end: the entry point instantiates the kernel."""
        while self.tokens[self.at].text != ";":
            self._emit("\n" if self.tokens[self.at].kind == "newline" else "")
        self._emit("")

    def _text_from(self, start: int, n: int) -> list[str]:
        """The next n tokens that are neither space nor comment."""
        found = []
        for token in self.tokens[start:]:
            if token.kind not in ("space", "newline", "comment"):
                found.append(token.text)
                if len(found) == n:
                    break
        return found

    def _qualifies_constructor(self) -> bool:
        """`X() thread {`: clang cannot build temporaries with such a constructor."""
        if self._text_from(self.at, 2)[1:] not in (["{"], [":"], [";"]):
            return False
        depth, name = 0, ""
        for token in self.tokens[self.at - 1 :: -1]:
            depth += (token.text == ")") - (token.text == "(")
            if token.kind == "name" and depth == 0:
                name = token.text
                break
        return name in self.classes

    def _declares_array(self) -> bool:
        """Whether `threadgroup` starts a declaration of memory, not of a pointer to it."""
        first = self._text_from(self.at, 5)
        if first[0] == "alignas" and "threadgroup" not in first:
            return False
        depth = 0
        for token in self.tokens[self.at + 1 :]:
            if token.text in ("<", "("):
                depth += 1
            elif token.text in (">", ")"):
                depth -= 1
                if depth < 0:
                    return False  # a cast or a parameter
            elif depth == 0 and token.text in ("*", "&", ",") and token.kind == "mark":
                return False
            elif depth == 0 and token.text in (";", "[", "="):
                return True
        return False

    def _threadgroup_array(self, start: Token) -> None:
        """`threadgroup T a[N], b;` -> a reference per name into the threadgroup's arena.

        OpenCL allows such variables in kernel functions only, and no template is one.
        """
        if not self.in_kernel:
            raise RewriteError(start.line, "threadgroup memory declared outside a kernel function")
        end = self.at
        while self.tokens[end].text != ";":
            end += 1
        inside = self.tokens[self.at : end]
        newlines = "\n" * sum(t.text.count("\n") for t in inside)
        self.at = end + 1
        self.out.append(self._references(inside, start.line) + newlines)

    def _references(self, inside: list[Token], line: int) -> str:
        code = [t for t in inside if t.kind not in ("newline", "comment")]
        declarators = split_top(code, ",")
        names = [first_declared(d) for d in declarators]
        first, align = without_alignas(declarators[0])
        at = next(i for i, t in enumerate(first) if t is names[0])
        kind = "".join(t.text for t in first[:at] if t.text != "threadgroup")
        text = ""
        for declarator, name in zip(declarators, names, strict=True):
            suffix = declarator[next(i for i, t in enumerate(declarator) if t is name) + 1 :]
            if any(t.text in ("=", "{") for t in suffix):
                raise RewriteError(line, f"threadgroup {name.text} has an initialiser")
            alias = f"msl_type_{self.n_arrays}"
            text += (
                f"using {alias} = {kind}{''.join(t.text for t in suffix)}; "
                f"threadgroup {alias}& {name.text} = *(threadgroup {alias}*)(ulong)msl_array("
                f'{self.n_arrays}, sizeof({alias}), {align or f"alignof({alias})"}, {line}, '
                f'"{name.text}");'
            )
            self.n_arrays += 1
        return text


def split_top(code: list[Token], mark: str) -> list[list[Token]]:
    """Split at a mark that stands outside all brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in code:
        depth += token.text in ("<", "(", "[", "{")
        depth -= token.text in (">", ")", "]", "}")
        if token.text == mark and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def without_alignas(declarator: list[Token]) -> tuple[list[Token], str]:
    """A declarator without its `alignas(...)`, and what stood in the brackets."""
    texts = [t.text for t in declarator]
    if "alignas" not in texts:
        return declarator, ""
    start = texts.index("alignas")
    end = texts.index(")", start)
    return declarator[:start] + declarator[end + 1 :], "".join(texts[start + 2 : end])


def first_declared(declarator: list[Token]) -> Token:
    """The name that a declarator declares: the last name before `[`, `=` or the end."""
    name, depth = None, 0
    for token in declarator:
        if depth == 0 and token.text in ("[", "=", "{"):
            break
        depth += token.text in ("<", "(")
        depth -= token.text in (">", ")")
        if depth == 0 and token.kind == "name":
            name = token
    if name is None:
        raise RewriteError(declarator[0].line if declarator else 0, "threadgroup without a name")
    return name


def literal(text: str) -> str:
    """A number as clang needs it: an unsuffixed floating literal is a float in Metal.

    clang's own switch for that is forgotten when a template is instantiated.
    """
    found = FLOAT.match(text)
    if not found:
        return text
    suffix = text[found.end() :]
    if suffix in ("h", "H"):
        return f"((half){found[0]}f)"
    if suffix in ("bf", "BF"):
        return f"((bfloat){found[0]}f)"
    return text if suffix else text + "f"
