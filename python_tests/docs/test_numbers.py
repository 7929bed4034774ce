"""The numbers and pictures of README.md and docs/ are those of the committed results."""

import re

import pytest

from benchmarks import documents


def test_pages_and_pictures_show_the_committed_results():
    assert not documents.stale(), "run `python -m benchmarks docs`"


def test_a_number_changed_by_hand_is_found():
    data, text = documents.load(), (documents.ROOT / "README.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `nt_xent`, N"))
    changed = text.replace(row, re.sub(r"\d+\.\dx", "9.9x", row))
    assert changed != text
    assert documents.filled(changed, data) == text


def test_a_picture_of_other_results_is_found(monkeypatch):
    of = documents.sources()
    monkeypatch.setattr(documents, "sources", lambda: {**of, "hero": "other"})
    assert documents.stale() == ["docs/pictures/hero.png"]


def test_an_unknown_block_is_refused():
    with pytest.raises(ValueError, match="block must be one of hero, rows, .*, got other"):
        documents.filled("<!-- numbers: other -->\n<!-- end -->", documents.load())
