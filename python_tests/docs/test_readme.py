"""README.md is a landing page: short, narrow, with the two set-up commands."""

import re

from .pages import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES, MOST_COLUMNS = 120, 100


def test_it_is_short_and_narrow():
    lines = TEXT.splitlines()
    assert len(lines) <= MOST_LINES
    assert not [line for line in lines if len(line) > MOST_COLUMNS]


def test_it_keeps_the_two_set_up_commands():
    for command in ("make demo", "make test"):
        assert re.search(rf"^{command}\b", TEXT, re.MULTILINE), command


def test_every_number_with_a_unit_is_generated():
    """Times, memory and speed-ups come from the committed results, not from a keyboard."""
    by_hand = re.sub(r"<!-- numbers: .*?<!-- end -->", "", TEXT, flags=re.DOTALL)
    assert not re.findall(r"\d[\d.,]* ?(?:ms|MiB|GiB|GFLOP|times|x)\b", by_hand)
