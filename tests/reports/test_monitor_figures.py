"""Promises about the pictures of a monitored batch."""

import pytest

from waferlab.reports import monitor_figures


def test_the_shares_at_an_axis_are_where_their_labels_say(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(monitor_figures, "save", lambda figure, path: figures.append(figure) or path)
    mix = [{"name": f"class {n}", "reference": 0.1, "estimated": 0.11, "interval": (0.03, 0.2)} for n in range(9)]
    monitor_figures.plot_class_mix(mix, path=tmp_path / "mix.png")
    (axes,) = figures[0].axes
    places = axes.get_xticks()
    labelled = list(zip(places, axes.xaxis.get_major_formatter().format_ticks(places), strict=True))
    assert len(labelled) > 3
    for place, text in labelled:
        assert float(text.rstrip("%").replace("\N{MINUS SIGN}", "-")) / 100 == pytest.approx(place, abs=1e-9)
