"""The scaling simulation: dealing by cost is never worse, balance depends on the groups a process has."""

import numpy as np

from bench import scaling


def test_balance_depends_on_groups_a_process():
    cells = {(r, n): scaling.simulate(None, r, n, 5) for r in (8, 64) for n in (1, 4, 16)}
    assert all(cell.busy >= cell.busy_round_robin and 0 < cell.efficiency <= cell.busy <= 1 for cell in cells.values())
    for ranks in (8, 64):
        assert cells[ranks, 1].busy < cells[ranks, 4].busy < cells[ranks, 16].busy
    # no process has less to do than the largest group
    assert all(cell.busy <= 1 / cell.bound + 0.05 for cell in cells.values() if cell.bound > 1)
    assert abs(cells[8, 16].busy - cells[64, 16].busy) < 0.05
    text = scaling.page(list(cells.values()), "drawn")
    assert "Costs of groups: drawn." in text and text.count("\n| 64 ") == 3


def test_the_drawn_costs_have_the_recorded_spread():
    drawn = scaling.draw(None, 200_000, np.random.default_rng(0))
    assert abs(drawn.mean() / scaling.MEAN_FLOPS - 1) < 0.02
    assert abs(np.log(drawn).std() - scaling.LOG_SPREAD) < 0.01
