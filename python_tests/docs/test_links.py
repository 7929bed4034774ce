"""Relative links of README.md and docs/ lead to files and headings that exist; the site shows every page once."""

import re

import pytest

from .pages import FENCE, PAGES, ROOT, name

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def links(page) -> list[str]:
    found = LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page) -> set[str]:
    """Headings as GitHub and mkdocs turn them into anchors."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        assert target.is_relative_to(ROOT), f"{name(page)} links to {link}, outside the repository"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {link}, which has no such heading"


def test_every_page_is_in_the_navigation_once():
    nav = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    made_by_a_hook = {"changelog.md", "ptxsim.md"}
    assert sorted(set(nav) - made_by_a_hook) == sorted(page.name for page in PAGES if page.parent == ROOT / "docs")
    assert len(nav) == len(set(nav))


def test_every_picture_is_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert set((ROOT / "docs/pictures").iterdir()) <= shown
