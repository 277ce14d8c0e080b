"""What users read about their cache: counters, summaries, pictures, in terminals and in notebooks."""

import html.parser
import io
import itertools
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

import torchcache
from torchcache.counters import History

DATA = torch.randn(60, 4)


def model(**options):
    torch.manual_seed(0)
    marked = torchcache.mark(nn.Linear(4, 8), freeze=True, **options)
    return torchcache.transform(nn.Sequential(nn.ModuleDict({"<b>[red]": marked})["<b>[red]"], nn.Linear(8, 2)))


def train(trained, passes, batch=10):
    generator = torch.Generator().manual_seed(1)
    for _ in range(passes):
        for rows in torch.randperm(60, generator=generator).split(batch):
            trained(DATA[rows])
    return trained


def test_hit_rates_are_told_pass_by_pass(tmp_path):
    options = {"persistent": True, "persistent_cache_dir": str(tmp_path)}
    (region,) = torchcache.stats(train(model(**options), 3)).regions
    assert region.hit_rates == pytest.approx((0, 1, 1))
    assert region.hit_rate == pytest.approx(2 / 3)
    assert [point.rows for point in region.history] == [*range(10, 181, 10), 180]
    torchcache.flush()
    warm = train(model(**options), 2)
    warm(DATA[:30])
    (region,) = torchcache.stats(warm).regions
    assert region.hit_rates == pytest.approx((1, 1, 1))


def test_passes_that_cannot_be_told_apart_are_not_made_up():
    (region,) = torchcache.stats(train(model(max_memory_cache_size=20 * 32), 3)).regions
    assert region.rows_stored == 20
    assert region.hits == 40
    assert region.hit_rates == ()


def test_history_stays_bounded_and_keeps_its_totals(monkeypatch):
    monkeypatch.setattr(History, "LIMIT", 16)
    trained = train(model(), 20)
    trained(DATA[:10])
    (region,) = torchcache.stats(trained).regions
    assert len(region.history) <= 17
    calls = [point.calls for point in region.history]
    assert {after - before for before, after in itertools.pairwise(calls[:-1])} == {8}
    assert region.history[-1].rows == region.rows == 1210
    assert sum(region.hit_rates[:20]) / 20 == pytest.approx(19 / 20)


def test_the_summary_says_what_is_saved_and_what_it_costs():
    trained = train(model(), 3)
    found = torchcache.summary(trained)
    (region,) = found.regions
    spent = region.hash_seconds + region.lookup_seconds + region.merge_seconds + region.audit_seconds
    assert found.cost_seconds == region.cost_seconds == spent
    assert found.saved_seconds == region.saved_seconds
    text = str(found)
    assert "0% 100% 100%" in text
    assert "67%" in text
    assert "spent on the cache" in text
    assert "nothing was looked up" in str(torchcache.summary(nn.Linear(2, 2)))


class Cells(html.parser.HTMLParser):
    """The texts and the tags of a page."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert all("#" not in value for _, value in attributes), "a fixed colour suits one background only"

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("report", [torchcache.stats, torchcache.summary])
def test_notebooks_and_terminals_show_names_as_they_are(report):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"<b>[red]": torchcache.mark(nn.Linear(4, 8), freeze=True)})

        def forward(self, x):
            return self.parts["<b>[red]"](x)

    held = torchcache.transform(Holder())
    held(DATA)
    found = report(held)
    assert "<b>[red]" in str(found)
    page = Cells(found._repr_html_())
    assert any("<b>[red]" in text for text in page.texts)
    assert {"table", "th", "td"} <= set(page.tags)
    assert "b" not in page.tags


@pytest.mark.parametrize("report", [torchcache.stats, torchcache.summary])
def test_a_narrow_terminal_shows_every_figure(report):
    trained = train(model(), 3)
    shown = {}
    for width in (40, 200):
        console = Console(width=width, file=io.StringIO())
        console.print(report(trained))
        shown[width] = console.file.getvalue()
    table = report(trained).table()
    for text in (*table.columns, *table.rows[0][1:]):
        assert text in shown[40]
        assert text in shown[200]
    assert "…" not in shown[40]


def test_a_picture_has_a_column_a_region_and_is_saved(tmp_path):
    pytest.importorskip("matplotlib")
    options = {"persistent": True, "persistent_cache_dir": str(tmp_path)}
    trained = train(model(**options), 2)
    torchcache.flush()
    path = tmp_path / "picture.png"
    figure = torchcache.plot(trained, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    hits, times, sizes = figure.axes
    assert "50% of 120 rows" in hits.get_title()
    (memory,) = hits.patches
    assert memory.get_data().values.tolist() == [0.0] * 6 + [100.0] * 6
    assert [each.get_label() for each in times.patches] == ["compute", "hash", "lookup", "merge", "audit"]
    assert sizes.lines[0].get_ydata()[-1] == 60 * 32
    assert [axes.get_ylabel() for axes in figure.axes] == ["hits, % of rows", "time of a step, ms", "bytes of rows"]


def test_no_picture_without_steps_or_without_matplotlib(monkeypatch):
    with pytest.raises(torchcache.TorchcacheError, match="after some steps"):
        torchcache.plot(model())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(torchcache.TorchcacheError, match="pip install matplotlib"):
        torchcache.plot(train(model(), 1))


@pytest.mark.parametrize("report", [torchcache.stats, torchcache.summary])
def test_each_region_has_a_line_of_its_own_below_the_table(report):
    pair = nn.ModuleList(torchcache.mark(nn.Linear(4, 4)) for _ in range(2))
    for part in pair:
        part(DATA)
    notes = [f"{place} (Linear): 60 rows not cached: it trains weight, bias" for place in range(2)]
    assert str(report(pair)).splitlines()[-2:] == notes
    assert "<br>".join(notes) in report(pair)._repr_html_()
