"""The page in a browser: it renders, fits, can be read and sorted, and asks nobody for anything."""

import json

import pytest

pytestmark = pytest.mark.slow

# Contrast of every text with what lies behind it (WCAG 2.2, relative luminance), and its size.
TEXTS = """
(() => {
  const parse = (text) => {
    const part = text.match(/[\\d.]+/g).map(Number);
    return {rgb: part.slice(0, 3), alpha: part.length > 3 ? part[3] : 1};
  };
  const light = ({rgb}) => rgb
    .map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.alpha === 1) return colour;
    }
    return {rgb: [255, 255, 255]};
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const words = walker.currentNode.data.trim();
    if (!words || element.closest("script, style, details:not([open]) > :not(summary)")) continue;
    const style = getComputedStyle(element);
    const inSvg = element instanceof SVGElement;
    const [one, two] = [light(parse(inSvg ? style.fill : style.color)), light(behind(element))];
    const scale = inSvg ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1;
    found.push({
      words,
      contrast: (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05),
      pixels: parseFloat(style.fontSize) * scale,
    });
  }
  return found;
})()
"""
COLUMN = (
    """[...document.querySelectorAll("#weights tbody tr")].map((row) => row.cells[%d].innerText)"""
)
SORTED = """[...document.querySelectorAll("#weights thead th")].map((h) => h.ariaSort)"""
HEADING = "#weights thead th:nth-child({}) button"


@pytest.fixture
def page(checkpoint, quantize, precalib, evaluation, tmp_path):
    """A report with everything a report can have."""
    source = checkpoint(config={"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2})
    target = quantize(source, "--recipe", "paper-4", "--override", "mlp=rtn-4")
    evaluations = [
        evaluation("own.json", target, "paper-4", 4.8, 0.2),
        evaluation("other.json", tmp_path / "other", "balanced-4", 4.3, 0.1),
    ]
    options = [part for file in evaluations for part in ("--eval", file)]
    out = tmp_path / "report.html"
    ran = precalib("report", target, "--out", out, "--against", source, *options)
    assert ran.code == 0, ran.err
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_renders_and_fits_and_can_be_read(browser, page, width, scheme):
    browser.open(page, width, scheme)
    assert browser.complaints == []
    assert {url for url in browser.requests if not url.startswith("data:")} == {page.as_uri()}
    across, inside = browser.run(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert width - 30 <= inside <= width
    assert across <= inside
    pictures = browser.run(
        "[...document.querySelectorAll('figure svg, .wide svg')].map((svg) =>"
        " [svg.getBoundingClientRect().width, svg.getBoundingClientRect().height])"
    )
    assert len(pictures) == 7 + 2  # a kind each, heat map and curve
    assert all(across > 200 and down > 100 for across, down in pictures)

    texts = browser.run(TEXTS)
    assert len(texts) > 300
    assert [text for text in texts if text["contrast"] < 4.5] == []
    assert [text for text in texts if text["pixels"] < 9] == []
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("way", ["mouse", "keyboard"])
def test_a_heading_sorts(browser, page, way):
    browser.open(page)

    def use(column):
        if way == "mouse":
            return browser.click(HEADING.format(column + 1))
        browser.run(f"document.querySelector({json.dumps(HEADING.format(column + 1))}).focus()")
        return browser.press("Enter", 13, "\r")

    names = browser.run("[...document.querySelectorAll('#weights thead th')].map(h => h.innerText)")
    bits, weight = names.index("bits"), 0
    error = names.index("error")
    first = browser.run(COLUMN % error)
    assert [float(text) for text in first] == sorted(map(float, first), reverse=True)
    assert [i for i, order in enumerate(browser.run(SORTED)) if order] == [error]
    for order in ("descending", "ascending", "descending"):
        use(bits)
        shown = [float(text) for text in browser.run(COLUMN % bits)]
        assert len(set(shown)) > 2
        assert shown == sorted(shown, reverse=order == "descending")
        state = browser.run(SORTED)
        assert state[bits] == order
        assert [i for i, other in enumerate(state) if other] == [bits]
    use(weight)
    modules = browser.run(COLUMN % weight)
    assert modules == sorted(modules)
    assert modules[0] == "model.layers.0.mlp.down_proj"
    assert len(modules) == 14
    assert browser.complaints == []


def test_every_heading_button_can_be_reached_with_tab(browser, page):
    browser.open(page)
    browser.run("document.querySelector('#filter').focus()")
    reached = []
    for _ in range(12):
        browser.press("Tab", 9)
        reached.append(browser.run("document.activeElement.innerText"))
    buttons = browser.run("[...document.querySelectorAll('#weights button')].map(b => b.innerText)")
    start = reached.index("weight")
    assert reached[start : start + len(buttons)] == buttons[: len(reached) - start]


def test_the_filter_shows_what_it_names(browser, page):
    browser.open(page)
    browser.run("document.querySelector('#filter').focus()")
    browser.call("Input.insertText", text="Q_PROJ")
    shown = browser.run(
        "[...document.querySelectorAll('#weights tbody tr')].filter(row => row.offsetHeight)"
        ".map(row => row.cells[0].innerText)"
    )
    assert sorted(shown) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert browser.run("document.querySelector('#shown').innerText") == "2 shown"


def test_without_scripts_the_worst_still_come_first(browser, page):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        errors = [float(row) for row in browser.run(COLUMN % 2)]
        assert errors == sorted(errors, reverse=True)
        assert not browser.run("document.querySelector('#filter').offsetHeight")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_name_in_the_table_leads_to_its_picture(browser, page):
    browser.open(page)
    browser.click("#weights tbody a")
    assert browser.run("document.querySelector(':target').tagName") == "FIGURE"
    assert browser.run("document.querySelector(':target h3').innerText") == browser.run(
        "document.querySelector('#weights tbody a').innerText"
    )
