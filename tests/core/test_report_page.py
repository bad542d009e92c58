"""The page of the report: what is on it, what is escaped, and what a browser makes of it."""

import html
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kl_plugins.report.charts import charts
from kl_plugins.report.figures import MOST_POINTS, look_of, static
from kl_plugins.report.findings import find
from kl_plugins.report.page import render
from kl_plugins.report.reading import read_runs
from kl_plugins.report.rules import RULES
from kl_plugins.report.styles import COLOURS, style
from tests.support.report.browser import PATH_VARIABLE, REQUIRED_VARIABLE, find_browser, open_page, print_page
from tests.support.report.logs_of_runs import LOGS, write_lines

HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror=alert(1)> & "quoted"'
REAL = [str(LOGS / name) for name in ("trl-default", "trl-native", "verl-default", "openrlhf-default")]
VOID = {"meta", "link", "img", "br", "hr", "input", "line", "rect", "circle"}


class Elements(HTMLParser):
    """All elements of a page, outside of scripts, as pairs of tag and attributes; and the text of some of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def page_of(*arguments: str) -> str:
    runs = read_runs(arguments)
    return render(runs, find(runs))


@pytest.fixture(scope="module")
def real() -> str:
    return page_of(*REAL)


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose data become stale at step 340, whose last loss is not a number, and whose name is hostile."""
    n = 400
    columns: dict[str, list[float | None]] = {
        "kl/floor_frac": [0.1] * 339 + [0.7] * (n - 339),
        "kl/value": [0.001 * i for i in range(n)],
        "kl/new metric": [1.0] * n,
        "reward": [0.5] * n,
        "loss": [1.0] * (n - 1) + [None],
    }
    path = write_lines(tmp_path_factory.mktemp("stale") / "log.jsonl", columns)
    return page_of(f"{HOSTILE}={path}")


@pytest.fixture
def opened(tmp_path: Path):
    def opening(text: str, *options: str):
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        return open_page(tmp_path / "page.html", tmp_path / "profile", *options)

    return opening


def test_findings_in_words_come_first(stale: str) -> None:
    words = "From step 340 on, half of all weights or more are below the floor (median of kl/floor_frac: 0.7)."
    assert words in stale
    assert stale.index("In step 400, loss is not a finite number.") < stale.index(words) < stale.index('<h2 id="runs">')
    assert stale.index('<h2 id="runs">') < stale.index("plotly.js v")  # they are there before any script runs
    assert "1 error, 2 warnings." in " ".join(stale.split())


def test_the_page_needs_nothing_else(real: str) -> None:
    elements = Elements(real)
    assert not elements.all("link")
    assert not [one for one in elements.all("script") if "src" in one]
    assert not [one for one in elements.all("img") if not str(one.get("src")).startswith("data:")]
    (policy,) = (one["content"] for one in elements.all("meta") if "http-equiv" in one)
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy


def test_text_of_a_log_cannot_become_markup(stale: str) -> None:
    assert HOSTILE not in stale
    assert html.escape(HOSTILE, quote=False)[:20] in stale
    assert "onerror=alert(1)>" not in stale


def test_headings_tables_and_pictures_can_be_read_aloud(real: str) -> None:
    elements = Elements(real)
    assert elements.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(one.get("scope") in ("col", "row") for one in elements.all("th"))
    pictures = [one for one in elements.all("svg") if one.get("role") == "img"]
    assert len(pictures) > 15
    assert all(one["aria-label"] for one in pictures)
    ids = [one["id"] for _, one in elements.found if one.get("id")]
    assert len(ids) == len(set(ids))
    links = {str(one["href"]).removeprefix("#") for one in elements.all("a")}
    assert links
    assert links <= set(ids)


def test_every_metric_has_a_plot_its_meaning_and_a_last_value(real: str) -> None:
    text = " ".join(html.unescape(real).split())
    assert "share of tokens whose weight the floor raised" in text
    assert "veRL: actor/kl_loss is the value of the estimator" in text
    assert re.search(r'<th scope="row">kl/ess</th><td>share</td><td class="number">[\d.]+ \(step 24\)', text)
    assert '<td class="number">not logged</td>' in text
    assert text.count("<figure ") == sum(len(plots) for _, plots in charts(read_runs(REAL)))


def test_a_metric_that_this_version_does_not_know_is_shown(stale: str) -> None:
    assert "Other metrics of kl-plugins" in stale
    assert "this version of kl-plugins does not describe it" in stale


def test_all_rules_are_listed_with_their_result(real: str) -> None:
    text = html.unescape(real)
    assert all(f"<td>{rule.condition}</td>" in text for rule in RULES)
    assert "metric not in the logs" in page_of(str(LOGS / "trl-native"))
    assert "<td>not found</td>" in text


def test_a_run_without_findings_says_so(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", {"kl/value": [0.0, 0.001]})
    assert "No rule found anything. That does not prove that a run is sound" in page_of(str(path))


def test_runs_differ_in_colour_dash_and_marker() -> None:
    styles = [style(index) for index in range(42)]
    assert len(set(styles)) == 42
    for part in zip(*styles[:6], strict=True):
        assert len(set(part)) == 6
    assert len(set(COLOURS)) == len(COLOURS)


def test_two_metrics_of_one_run_in_a_plot_differ_in_dash_and_marker() -> None:
    sections = charts(read_runs([str(LOGS / "verl-native")]))
    chart = next(plot for _, plots in sections for plot in plots if plot.title == "KL between old and new policy")
    first, second = (look_of(line, chart) for line in chart.lines)
    assert first.colour == second.colour
    assert first.dash != second.dash
    assert first.marker != second.marker


def test_long_runs_stay_small_and_keep_their_spikes(tmp_path: Path) -> None:
    values = [0.0] * 20_000
    values[12_345] = 77.25
    path = write_lines(tmp_path / "log.jsonl", {"kl/value": values})
    (run,) = read_runs([str(path)])
    text = page_of(str(path))
    assert "77.25" in text
    assert text.count("0.0,") < 3 * MOST_POINTS
    (chart,) = (plot for _, plots in charts([run]) for plot in plots)
    assert "77.2" in static(chart)


def test_a_plot_of_values_that_are_not_finite_is_drawn(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", {"kl/value": [None, None, None], "kl/ess": [1.0, None, 0.5]})
    text = page_of(str(path))
    assert "has no finite value" in text
    assert text.count("<figure ") == 2


def test_a_browser_draws_every_plot_without_a_complaint(real: str, opened) -> None:
    page = opened(real)
    assert not page.console
    elements = Elements(page.dom)
    assert len([one for one in elements.all("div") if "plotly-graph-div" in str(one.get("class"))]) == real.count(
        "<figure "
    )
    drawn = re.search(r'data-drawn="(\d+)"', page.dom)
    assert drawn
    assert int(drawn[1]) >= real.count("<figure ")
    assert 'class="static"' not in page.dom  # each static picture has given way to an interactive one
    legends = set(re.findall(r'class="legendtext"[^>]*>([^<]+)<', page.dom))
    assert {"trl-default", "trl-native", "verl-default", "openrlhf-default"} <= legends
    for colour in COLOURS[:4]:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert f"stroke: rgb({red}, {green}, {blue})" in page.dom
    assert "stroke-dasharray" in page.dom


def test_a_browser_runs_nothing_that_a_log_contains(stale: str, opened) -> None:
    page = opened(stale)
    assert not page.console
    assert "<title>taken" not in page.dom
    assert 'src="x"' not in page.dom


def test_without_scripts_the_static_pictures_and_all_words_are_there(real: str, opened) -> None:
    page = opened(re.sub(r"<script>.*?</script>", "", real, flags=re.DOTALL))
    assert "main-svg" not in page.dom
    assert page.dom.count('class="static"') == real.count("<figure ")
    assert page.dom.count("<polyline ") > 40
    assert "kl-plugins was not active" in page.dom


def test_the_page_can_be_printed(real: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(real, encoding="utf-8")
    printed = print_page(tmp_path / "page.html", tmp_path / "profile", tmp_path / "page.pdf")
    assert printed.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b(?!s)", printed))
    assert 5 < pages < 40


def test_a_missing_browser_skips_and_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATH_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv(REQUIRED_VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium or Chrome was found"):
        find_browser()
    monkeypatch.setenv(REQUIRED_VARIABLE, "1")
    with pytest.raises(pytest.fail.Exception, match=REQUIRED_VARIABLE):
        find_browser()
    monkeypatch.setenv(PATH_VARIABLE, "/somewhere/chrome")
    assert find_browser() == "/somewhere/chrome"
