"""The benchmark against plain Gymnasium environments: equal trials first. Nothing here depends on a time."""

from __future__ import annotations

import pytest

pytest.importorskip("gymnasium")

from metadist.benchmarks import rl2
from metadist.benchmarks.plain_environments import TWINS, PlainBandit


def test_plain_twins_pay_the_same(monkeypatch):
    """Every environment's twin, over whole trials under one policy; and a twin that cheats is found."""
    for environment in rl2.CASES.values():
        rl2._prove_same(rl2._learner(environment, 8, "cpu"))

    class Generous(PlainBandit):
        def move(self, action, noise):
            return 1.0

    monkeypatch.setitem(TWINS, "Bandit", Generous)
    with pytest.raises(rl2.OtherRewardsError, match="Bandit"):
        rl2._prove_same(rl2._learner({"name": "bandit"}, 8, "cpu"))


def test_the_report(monkeypatch):
    monkeypatch.setattr(rl2, "PLAIN_COUNT", 4)
    monkeypatch.setattr(rl2, "CASES", {"bandit": {"name": "bandit", "episodes": 3}})
    report = rl2.run(environments=[8], hidden=4, rounds=2)
    assert set(report["cases"]) == {"bandit, 8 environments: stepping alone", "bandit, 8 environments: end to end"}
    for case in report["cases"].values():
        assert case["contestants"][rl2.OURS]["median"] > 0
        assert case["contestants"][rl2.PLAIN]["ratio"] == 1
