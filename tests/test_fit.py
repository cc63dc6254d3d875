"""Tables on narrow terminals: what would be misread if a number were cut."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from packcli.report.fit import Fitted


@given(st.integers(30, 150), st.integers(1, 12), st.integers(1, 9))
def test_no_number_is_cut_however_narrow_the_terminal(width: int, columns: int, digits: int) -> None:
    cells = [[str(10**digits + column * 100 + row) for row in range(3)] for column in range(columns)]
    named = [("arm", ["one", "two", "three"]), *((f"column\n{number}", own) for number, own in enumerate(cells))]
    output = io.StringIO()
    Console(file=output, width=width).print(Fitted(named, title="title", caption="below"))
    shown = output.getvalue()
    assert "…" not in shown
    for own in cells:
        for cell in own:
            assert cell in shown
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("title") == shown.count("below") == 1


def test_control_characters_in_labels_are_shown_and_not_obeyed() -> None:
    output = io.StringIO()
    Console(file=output, width=80).print(Fitted([("arm", ["a\x1b[31m"]), ("x\x07", ["1"])], caption="b\x1b"))
    assert "\x1b" not in output.getvalue()
    assert "\x07" not in output.getvalue()
