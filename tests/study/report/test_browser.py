"""The page works in a browser, without a network: figures, contents, toggles, keyboard, phone, dark mode, print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM, Browser, browser
from helpers.study_folder import THREAT, write_study

from ctlens.study.report import write_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on the path"),
]

IDLE = "!working && stale.size === 0"
PLOT = "document.querySelector('#figure-{} .plot')"
DOSE = PLOT.format(f"{THREAT}-dose")
SEEN = f"{DOSE}.data.filter(trace => trace.visible).map(trace => trace.meta.method)"
FOCUS = "document.activeElement"
# Text with its colour and the colour behind it; cells of matrices write on their own colour.
COLOURS = """
[...document.querySelectorAll("main *, .side *")].flatMap(element => {
  const drawn = element.closest("svg"), style = getComputedStyle(element), box = element.getBoundingClientRect();
  const says = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!says || !box.width || element.closest(".heatmaplayer, .modebar, .unseen, .skip, script, noscript")) return [];
  let behind = element;
  while (behind && /, 0\\)$/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const on = getComputedStyle(behind || document.body).backgroundColor;
  return [[element.textContent.trim().slice(0, 40), drawn ? style.fill : style.color, on]];
})
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_study(tmp_path_factory.mktemp("study") / "run"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def unfold(chromium: Browser, page: Path) -> None:
    """Opens the page with every part unfolded."""
    chromium.open(page)
    chromium.run("all('.fold').forEach(part => { part.open = true; })")


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_guidelines():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.01)


def test_a_page_that_logs_an_error_and_asks_for_a_picture_is_found_out(chromium, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/picture.png'><script>console.error('no'); missing()</script>")
    chromium.open(bad)
    assert chromium.requests() == ["http://127.0.0.1:9/picture.png"]
    assert any('"no"' in error for error in chromium.errors())
    assert any("missing is not defined" in error for error in chromium.errors())


def test_every_figure_draws_without_an_error_and_nothing_leaves_the_page(chromium, page):
    unfold(chromium, page)
    chromium.wait(IDLE)
    drawn = chromium.run("[...figures.keys()].map(plot => plot.querySelectorAll('.trace, .heatmaplayer .hm').length)")
    traces = chromium.run("[...figures.values()].map(saved => saved.data.length)")
    assert len(drawn) == 6 and drawn == traces and all(drawn)
    assert chromium.errors() == [] and chromium.requests() == []


def test_the_keyboard_reaches_the_skip_link_the_contents_and_the_parts(chromium, page):
    chromium.open(page)
    chromium.press("Tab")
    assert chromium.run(f"{FOCUS}.textContent") == "Skip to the answer"
    chromium.press("Tab")
    assert chromium.run(f"{FOCUS}.textContent") == "Contents"
    for _ in range(8):
        chromium.press("Tab")
    assert chromium.run(f"{FOCUS}.hash") == f"#mechanism-{THREAT}"
    assert not chromium.run(f"document.querySelector('#mechanism-{THREAT}').open")
    chromium.press("Enter")
    chromium.wait("document.querySelector('[aria-current]')?.hash === '#mechanism-sycophancy'")
    assert chromium.run("document.querySelectorAll('[aria-current]').length") == 1
    chromium.wait(f"Math.abs(document.querySelector('#mechanism-{THREAT}').getBoundingClientRect().top) < 100")


def test_the_last_part_is_marked_at_the_end_of_the_page(chromium, page):
    unfold(chromium, page)
    chromium.wait(IDLE)
    chromium.run("scrollTo({top: document.documentElement.scrollHeight, behavior: 'instant'})")
    chromium.wait("document.querySelector('[aria-current]').hash === '#repeat'")


def test_a_method_is_hidden_and_shown_by_keyboard_in_figures_and_tables(chromium, page):
    unfold(chromium, page)
    chromium.wait(IDLE)
    assert chromium.run(SEEN) == ["act", "bct", "act", "bct"]
    chromium.run("document.querySelector('.methods button[value=none]').focus()")
    for _ in range(3):
        chromium.press("Tab")
    assert chromium.run(f"{FOCUS}.value") == "act"
    chromium.press(" ")
    chromium.wait(IDLE)
    assert chromium.run(SEEN) == ["bct", "bct"]
    assert chromium.run("[...document.querySelectorAll('main [data-method=act]')].every(row => row.hidden)")
    assert not chromium.run("[...document.querySelectorAll('main [data-method=bct]')].some(row => row.hidden)")
    cells = PLOT.format("cross-threat") + ".data.map(trace => [trace.meta.method, trace.visible])"
    assert chromium.run(cells) == [["act", False], ["bct", True]]
    assert chromium.run(PLOT.format("z_dose") + ".querySelectorAll('.trace').length") == 0
    chromium.press(" ")
    chromium.wait(IDLE)
    assert chromium.run(SEEN) == ["act", "bct", "act", "bct"]
    assert chromium.errors() == []


def test_a_figure_that_cannot_be_drawn_is_an_error_and_leaves_the_others_alone(chromium, page):
    unfold(chromium, page)
    chromium.wait(IDLE)
    first = "[...figures.keys()][0]"
    chromium.run(f"figures.get({first}).layout = {{get xaxis() {{ throw new Error('broken'); }}}}, refresh()")
    chromium.wait(IDLE)
    assert chromium.run(SEEN) == ["act", "bct", "act", "bct"]
    assert len(chromium.errors()) == 1 and "broken" in chromium.errors()[0]


def test_all_methods_are_hidden_and_shown_at_once(chromium, page):
    unfold(chromium, page)
    for button, seen in (("none", []), ("all", ["act", "bct", "act", "bct"])):
        chromium.run(f"document.querySelector('.methods button[value={button}]').click()")
        chromium.wait(IDLE)
        assert chromium.run(SEEN) == seen


def test_the_first_trace_that_is_left_stands_for_its_group_in_the_legend(chromium, page):
    chromium.open(page)
    shared = "{legendgroup: 'null', name: 'null', showlegend: %s, meta: {method: '%s'}}"
    traces = f"[{shared % ('true', 'act')}, {shared % ('false', 'bct')}]"
    listed = f"chosen({traces}).map(trace => trace.visible && trace.showlegend)"
    assert chromium.run(listed) == [True, False]
    chromium.run("document.querySelector('.methods input[value=act]').click()")
    assert chromium.run(listed) == [False, True]


def test_a_phone_shows_the_whole_page_and_one_list_at_a_time(chromium, page):
    chromium.open(page, width=390, height=844)
    chromium.wait(IDLE)
    assert chromium.run("document.documentElement.scrollWidth") == 390
    opened = "lists.map(list => list.open)"
    assert chromium.run(opened) == [False, False]
    for number, expected in enumerate(([True, False], [False, True])):
        chromium.run(f"lists[{number}].querySelector('summary').click()")
        chromium.wait(f"JSON.stringify({opened}) === '{str(expected).lower().replace(' ', '')}'")
    chromium.press("Escape")
    assert chromium.run(opened) == [False, False]
    assert chromium.run(f"{FOCUS}.textContent") == "Methods"
    wide = "document.querySelector('#figure-cross-threat .scroll')"
    assert chromium.run(f"{wide}.scrollWidth > {wide}.clientWidth && {wide}.tabIndex === 0")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_text_stands_out_from_what_is_behind_it(chromium, page, dark, width):
    chromium.open(page, width=width, dark=dark)
    chromium.wait(IDLE)
    found = chromium.run(COLOURS)
    assert len(found) > 150 and any("training steps" in text for text, *_ in found)
    assert [(text, contrast(*colours)) for text, *colours in found if contrast(*colours) < 4.5] == []


def test_the_numbers_of_a_figure_come_as_a_table_when_asked_for(chromium, page):
    unfold(chromium, page)
    numbers = f"document.querySelector('#figure-{THREAT}-dose .numbers')"
    assert chromium.run(f"{numbers}.querySelector('table') === null")
    chromium.run("saved = [], URL.createObjectURL = file => `blob:${saved.push(file)}`, 0")
    chromium.run(f"{numbers}.open = true")
    chromium.wait(f"{numbers}.querySelector('table') !== null")
    rows = f"[...{numbers}.querySelectorAll('tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    assert chromium.run(rows) == [
        ["series", "x", "y"],
        ["ACT", "0", "0.1235"],
        ["ACT", "20", "0.5"],
        ["BCT, mine", "0", "1"],
    ]
    assert chromium.run(f"[...{numbers}.querySelectorAll('thead th')].every(cell => cell.scope === 'col')")
    assert chromium.run(f"{numbers}.querySelector('a').download") == f"{THREAT}-dose.csv"
    assert chromium.run("saved[0].text()").splitlines()[-1] == '"BCT, mine",0,1'
    assert chromium.run("document.querySelectorAll('.numbers').length") == 1  # no table is promised where there is none


def test_print_draws_everything_at_once_in_light_colours_at_page_width(chromium, page):
    chromium.open(page, dark=True)
    drawn = "[...figures.keys()].every(plot => plot.querySelector('.main-svg'))"
    assert chromium.run(f"dispatchEvent(new Event('beforeprint')), {drawn}")
    chromium.media("print", **{"prefers-color-scheme": "light"})  # as browsers do; the page must not draw for it
    chromium.call("Emulation.setDeviceMetricsOverride", width=680, height=800, deviceScaleFactor=1, mobile=False)
    chromium.run("new Promise(resolve => setTimeout(resolve, 400))")
    fills = chromium.run(f"[...{DOSE}.querySelectorAll('.xtick text')].map(text => getComputedStyle(text).fill)")
    assert len(fills) > 1 and all(contrast(fill, "rgb(255, 255, 255)") > 7 for fill in fills)
    assert chromium.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    widths = chromium.run(
        "[...figures.keys()].map(plot => plot.querySelector('.main-svg').getBoundingClientRect().width)"
    )
    assert max(widths) <= 680 and chromium.run("document.documentElement.scrollWidth") <= 680
    assert not chromium.run(
        "[document.querySelector('.side'), document.querySelector('.numbers')].some(e => e.offsetWidth)"
    )
    chromium.media("", **{"prefers-color-scheme": "dark"})
    chromium.run("dispatchEvent(new Event('afterprint'))")
    chromium.wait(IDLE)
    fills = chromium.run(f"[...{DOSE}.querySelectorAll('.xtick text')].map(text => getComputedStyle(text).fill)")
    assert all(contrast(fill, "rgb(255, 255, 255)") < 2 for fill in fills)


def test_motion_is_left_to_those_who_want_it(chromium, page):
    behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
    chromium.open(page)
    chromium.media(**{"prefers-reduced-motion": "reduce"})
    assert chromium.run(behaviour) == "auto"
    chromium.media(**{"prefers-reduced-motion": "no-preference"})
    assert chromium.run(behaviour) == "smooth"


def test_the_page_prints(chromium, page):
    chromium.open(page)
    assert chromium.pdf().startswith(b"%PDF")
    assert chromium.errors() == []
