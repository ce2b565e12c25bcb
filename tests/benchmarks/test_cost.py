"""The benchmark of cost: equal FLOPs, and a verdict that follows the numbers."""

import numpy as np
import pytest

from benchmarks import cost
from jaxrl.cost import alpha_flops
from jaxrl.cost.alpha_flops import Shape


@pytest.mark.parametrize("macs", [1e6, 1e8])
def test_layers_of_a_group_have_equal_flops_and_different_shapes(macs):
    rows = cost.grid(macs)
    shape = Shape(*np.array(rows, float).T)
    np.testing.assert_allclose(shape.macs, macs, rtol=0.1)
    assert len(set(rows)) == len(rows) >= 15
    assert len(set(shape.S)) >= 6
    assert set(shape.K1) == {1, 3, 5}


def verdict_where(monkeypatch, time_ms):
    monkeypatch.setattr(alpha_flops, "time_layers", lambda shape, num_repeats: time_ms(shape))
    return cost.layers(cost.Layers(macs=(1e6, 1e7, 1e8)))


def test_where_the_formula_holds_the_verdict_says_so(monkeypatch, capsys):
    result = verdict_where(monkeypatch, alpha_flops.predicted_ms)
    (everything,) = (row for row in result["ranks"] if row["layers"] == "all")
    assert everything["spearman_alpha_flops"] == pytest.approx(1.0)
    assert "rank the times better than plain FLOPs" in result["verdict"][0]
    assert result["fit"]["errors"]["cv_median"] < 0.01
    assert result["verdict"][0] in capsys.readouterr().out


def test_where_flops_tell_the_time_the_verdict_is_against_it(monkeypatch):
    result = verdict_where(monkeypatch, lambda shape: shape.flops / 1e9)
    (everything,) = (row for row in result["ranks"] if row["layers"] == "all")
    assert everything["spearman_flops"] == pytest.approx(1.0)
    assert "rank the times worse than plain FLOPs" in result["verdict"][0]


def test_every_agent_with_presets_is_found():
    pairs = cost.all_pairs()
    assert ("ppo", "MicroRacer-v0") in pairs
    assert len(set(pairs)) == len(pairs)


def test_unknown_pairs_are_refused(capsys):
    assert cost.cli(["runs", "--pairs", "alphago:Go-v0"]) == 2
    assert "'alphago:Go-v0' must be agent:environment" in capsys.readouterr().err
    assert cost.cli(["layers", "--macs", "1"]) == 2
    assert "macs = 1.0 must lie in" in capsys.readouterr().err
