"""The page as a person uses it, in a real browser: sort, filter, point, choose, switch colours; nothing
leaves it and nothing fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from aquabit.reports import report, style
from tests.browser import Page, chromium, opened
from tests.pages import EVIL, Synthetic

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)

FIRST = "document.querySelector('#layer-table tbody tr .pick')"
NAMES = "Array.from(document.querySelectorAll('#layer-table tbody tr .pick'), (e) => e.textContent)"
HEADING = "document.querySelector('#layer h3').textContent"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return Synthetic(
        tmp_path_factory.mktemp("browser") / "S.db", names=EVIL, model=EVIL[0] + EVIL[1], samples=24
    ).whole()


@pytest.fixture(scope="module")
def file(made: Synthetic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "FORMATS", {})  # these take most of the time
        return report(made.study, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(tmp_path_factory.mktemp("profile")) as tab:
        tab.open(file)
        yield tab
        assert not tab.errors, tab.errors
        assert {address for address in tab.requests if not address.startswith("data:image/png;")} == {
            file.as_uri()
        }


def test_sorting_and_filtering_the_layers(page: Page, made: Synthetic) -> None:
    order = [made.space.layers[i] for i in (-made.damage).argsort(kind="stable")]
    assert page.run(NAMES) == order, "most harmful first, and hostile names as they are"
    effect = "document.querySelector('th[data-key=effect] button')"
    page.click(effect)
    assert (
        page.run(NAMES) == order[::-1]
        and page.run(f"{effect}.parentNode.getAttribute('aria-sort')") == "ascending"
    )
    page.click("document.querySelector('th[data-key=layer] button')")
    assert page.run("document.querySelector('th[data-key=effect]').getAttribute('aria-sort')") == "none"
    page.click("document.getElementById('layer-filter')")
    page.type("ADALN blocks.1")
    assert page.run(NAMES) == ["transformer_blocks.1.adaln.to_out_15.proj"]
    assert page.run("document.getElementById('layer-count').textContent") == "1 of 24 layers"
    page.run(
        "document.getElementById('layer-filter').value = '';"
        " document.getElementById('layer-filter').dispatchEvent(new Event('input'))"
    )
    assert len(page.run(NAMES)) == 24


def test_pointing_names_a_layer_and_a_click_chooses_it_everywhere(page: Page, made: Synthetic) -> None:
    second = (-made.damage).argsort()[1]
    point = "document.querySelector('#layer_ranking use[data-layer=\"1\"]')"
    page.move(point)
    tip = page.run("document.getElementById('tip').textContent")
    assert tip.startswith(f"{made.space.layers[second]}: FID ") and not page.run(
        "document.getElementById('tip').hidden"
    )
    page.click(point)
    assert page.run(HEADING) == made.space.layers[second]
    ringed = "Array.from(document.querySelectorAll('.ring'), (e) => e.closest('figure').id)"
    assert {"layer_ranking", "operators", "blocks", "layer_graph", "chosen_bits"} <= set(page.run(ringed))
    assert (
        page.run("document.querySelector('tr[aria-selected=true] .pick').textContent")
        == made.space.layers[second]
    )
    cells = page.run("Array.from(document.querySelectorAll('#layer table tbody tr'), (r) => r.textContent)")
    assert any(c.startswith("usq2") for c in cells) and any(c.startswith("usq4") for c in cells)
    page.press("Escape")
    assert page.run("document.getElementById('tip').hidden")
    page.move("document.querySelector('#quality_vs_bits use[data-tip]')")
    assert " bits, FID " in page.run("document.getElementById('tip').textContent"), (
        "configurations are named too"
    )


def test_the_keyboard_walks_through_layers_and_chooses(page: Page) -> None:
    names = page.run(NAMES)
    page.run(f"{FIRST}.focus()")
    page.press("ArrowDown")
    page.press("ArrowDown")
    page.press("ArrowUp")
    assert page.run("document.activeElement.textContent") == names[1]
    page.press("Enter")
    assert page.run(HEADING) == names[1]
    assert page.run("document.querySelectorAll('#layer-table .pick[tabindex=\"0\"]').length") == 1, (
        "one stop of the tab key"
    )
    link = "document.querySelector('#layer .link')"
    if page.run(f"{link} !== null"):
        other = page.run(f"{link}.textContent")
        page.click(link)
        assert page.run(HEADING) == other


def test_colours_follow_the_system_until_someone_chooses(page: Page) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    light = page.run(colour)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = page.run(colour)
    assert light != dark and page.run("document.getElementById('theme').textContent") == "Light"
    page.click("document.getElementById('theme')")
    assert (
        page.run(colour) == light
        and page.run("document.getElementById('theme').getAttribute('aria-label')")
        == "Switch to dark colours"
    )
    page.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.call("Emulation.setEmulatedMedia", media="", features=[])


def test_hostile_names_are_text_and_downloads_are_there(page: Page, file: Path) -> None:
    page.run("window.alert = () => { window.hostile = true; }")
    for name in EVIL:
        assert name in page.run(NAMES)
        page.click(
            "Array.from(document.querySelectorAll('.pick')).find((e) => e.textContent ==="
            f" {json.dumps(name)})"
        )
        assert page.run(HEADING) == name
    assert page.run("document.querySelectorAll('img').length") == 3 and page.run("window.hostile") is None
    drawn = page.run("Array.from(document.querySelectorAll('#layer_ranking text'), (e) => e.textContent)")
    assert set(EVIL) <= set(drawn)
    links = page.run(
        "Array.from(document.querySelectorAll('#downloads ~ ul a, section a'), (e) => e.getAttribute('href'))"
    )
    assert "data/config.json" in links
    for link in links:
        assert link.startswith("#") or link.endswith((".pdf", ".png")) or (file.parent / link).is_file(), link
