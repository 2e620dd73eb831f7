"""Stop strings are found wherever the pieces are cut, and nothing is held back needlessly."""

from hypothesis import given
from hypothesis import strategies as st

from ds4py.engine.stopping import StopStrings

pieces = st.lists(st.text(alphabet="ab", max_size=4), max_size=12)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


@given(pieces, stops)
def test_equals_search_in_the_whole_text(parts: list[str], wanted: list[str]) -> None:
    finder, shown, found = StopStrings(wanted), "", False
    consumed = ""
    for part in parts:
        text, found = finder.push(part)
        shown, consumed = shown + text, consumed + part
        if found:
            break
    hits = [at for stop in wanted if (at := consumed.find(stop)) >= 0]
    assert found == bool(hits)
    if found:
        assert shown == consumed[: min(hits)]
    else:
        held = consumed[len(shown) :]
        assert any(stop.startswith(held) for stop in wanted) or held == ""
        assert shown + finder.flush() == consumed


def test_holds_back_only_what_may_become_a_stop() -> None:
    finder = StopStrings(["END"])
    assert finder.push("the E") == ("the ", False)
    assert finder.push("Nd") == ("ENd", False)
    assert finder.push("EN") == ("", False)
    assert finder.push("D of it") == ("", True)
    assert finder.found == "END"
