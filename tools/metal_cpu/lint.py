"""Rules of Metal that clang's OpenCL front end does not enforce, checked on the tokens.

Every pointer and reference names its address space, program-scope variables are `constant`, and
threadgroup memory has no initialiser (see rewrite.py). In OpenCL such pointers would be generic and
such variables global; Apple's compiler refuses or, since Metal 4.1, may treat them as generic.
"""

from __future__ import annotations

from dataclasses import dataclass

SPACES = {"device", "threadgroup", "thread", "constant"}
NOT_TYPES = {
    "return", "case", "else", "sizeof", "throw", "goto", "operator", "using", "typename", "do",
}  # fmt: skip
POINTERS = {"*", "&", "&&"}
AFTER_A_NAME = {"=", ";", ",", ")", "[", "{", ":"}


class RewriteError(ValueError):
    """The text breaks a rule. `line` is its line."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


@dataclass
class Token:
    kind: str
    text: str
    line: int


def lint(code: list[Token]) -> None:
    """Check tokens without space, comments and directives. Raises RewriteError."""
    scopes: list[bool] = []  # of the open braces: whether declarations stand inside
    statement: list[Token] = []
    for i, token in enumerate(code):
        if token.text in POINTERS and i and token.kind == "mark":
            _check_pointer(code, i, all(scopes))
        if token.text == "{":
            scopes.append(_holds_declarations(code, i))
        elif token.text == "}" and scopes:
            scopes.pop()
        if scopes:
            statement.clear()
        elif token.text == ";":
            _check_variable(statement)
            statement.clear()
        elif token.text == "}":
            statement.clear()
        else:
            statement.append(token)


def _holds_declarations(code: list[Token], brace: int) -> bool:
    """Whether a brace opens a class or a namespace, not a function or an initialiser."""
    at = brace - 1
    words = set()
    while at >= 0 and code[at].text not in (";", "{", "}"):
        words.add(code[at].text)
        at -= 1
    return bool(words & {"struct", "class", "union", "namespace"}) and not words & {")", "="}


def _check_pointer(code: list[Token], at: int, among_declarations: bool) -> None:
    """A `*` or `&` that declares something must have an address space before it."""
    if code[at - 1].text in POINTERS:
        return  # the first of them is checked
    after = at
    while after < len(code) and code[after].text in POINTERS | {"const", "volatile", "restrict"}:
        after += 1
    start = _type_start(code, at - 1)
    words = {t.text for t in code[start:at]}
    if after + 1 >= len(code) or start == at or words & (NOT_TYPES | SPACES | {"auto"}):
        return
    follows, then = code[after], code[after + 1].text
    before = code[start - 1].text if start else ";"
    if follows.kind == "name":
        declares = (
            then in AFTER_A_NAME or (then == "(" and among_declarations)
        ) and _starts_declaration(code, start - 1, among_declarations)
    else:
        declares = (before, follows.text) in (("(", ")"), ("<", ">"), (",", ">"))
    if declares:
        written = " ".join(t.text for t in code[start : after + 1])
        raise RewriteError(
            code[at].line,
            f"'{written}' names no address space; put device, threadgroup, thread or constant "
            "before the type",
        )


def _starts_declaration(code: list[Token], at: int, among_declarations: bool) -> bool:
    """Whether what follows the token can be a type with a name, and not a product."""
    if at < 0 or code[at].text in (";", "}"):
        return True
    if code[at].text == "{":
        return _opens_block(code, at)
    if code[at].text == ">" and among_declarations:
        return True  # the end of a template's parameters
    if code[at].text == "(" and at and code[at - 1].text == "for":
        return True
    return among_declarations and code[at].text in ("(", ",") and _in_parameters(code, at)


def _opens_block(code: list[Token], brace: int) -> bool:
    """Whether a brace opens statements or members, not an initialiser."""
    before = code[brace - 1].text if brace else ";"
    if before == "{":
        return _opens_block(code, brace - 1)
    return before in (")", "else", "do", ";", "}") or _holds_declarations(code, brace)


def _in_parameters(code: list[Token], at: int) -> bool:
    """Whether a place stands in the parameter list of a function: after a type and a name."""
    depth = 0
    while at >= 0 and not (code[at].text == "(" and depth == 0):
        depth += (code[at].text == ")") - (code[at].text == "(")
        at -= 1
    if at < 2 or code[at - 1].kind != "name":
        return False
    return code[at - 2].kind == "name" or code[at - 2].text in POINTERS | {">", "::"}


def _type_start(code: list[Token], at: int) -> int:
    """Index of the first token of the type that ends at `at`; at + 1 if there is no type."""
    end = at + 1
    while at >= 0:
        token = code[at]
        if token.text == ">":
            depth, close = 0, at
            while at >= 0:
                depth += (code[at].text == ">") - (code[at].text == "<")
                if depth == 0:
                    break
                at -= 1
            at -= 1
            if at >= 0 and code[at].text == "template":
                return close + 1
            if at < 0 or code[at].kind != "name":
                return end
        elif token.kind == "name" or token.text == "::":
            at -= 1
        else:
            break
    return at + 1


def _check_variable(statement: list[Token]) -> None:
    """A variable at program scope must lie in `constant` memory."""
    if not statement or statement[0].text in ("using", "typedef", "template", "static_assert"):
        return
    words = {t.text for t in statement}
    at = next((i for i, t in enumerate(statement) if t.text in ("=", "(")), None)
    if at is not None and statement[at].text == "=" and not words & {"constant", "MLX_MTL_CONST"}:
        raise RewriteError(
            statement[0].line, "a variable at program scope must be declared `constant`"
        )
