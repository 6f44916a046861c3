import csv
import math

import pytest
import torch

from lightning_l2l.evaluation.results import (
    Result,
    adam_final_loss,
    best_final_loss,
    final_losses,
    ratio,
    write_comparison,
    write_curves,
    write_predictions,
)


def test_statistics_of_a_result():
    result = Result("sgd", torch.tensor([[4.0, 4, 4, 4, 4], [1, 2, 3, 4, 10]]).double(), 0.1)
    assert result.mean.tolist() == [4, 4] and result.final_loss == 4 and result.final_quantile(0.5) == 3
    assert result.final_standard_error == pytest.approx(math.sqrt((9 + 4 + 1 + 0 + 36) / 4 / 5))
    assert result.quantile(0.125).tolist() == [4, 1.5]
    assert result.diverged == 0
    assert math.isnan(Result("one task", torch.ones(2, 1).double()).final_standard_error)


def test_final_loss_is_the_mean_of_the_last_steps():
    losses = torch.tensor([[9.0, 9], [4, 5], [1, 3]]).double()
    assert final_losses(losses, 1).tolist() == [1, 3] and final_losses(losses, 2).tolist() == [2.5, 4]
    result = Result("sgd", losses, final_steps=2)
    assert result.final_loss == 3.25 and result.final_quantile(0) == 2.5 and result.trajectory_loss == 3.25
    assert result.final_standard_error == pytest.approx(0.75)
    for steps in (0, 3):  # f_0 is the loss before the first step
        with pytest.raises(ValueError, match=f"final_steps={steps} is out of range; use 1 to 2"):
            final_losses(losses, steps)


@pytest.mark.parametrize("final_steps, goal, want", [(1, 3, 2), (1, 4, 1), (1, 0.5, None), (2, 3, 2), (2, 2.9, 3)])
def test_steps_until_a_loss_is_reached(final_steps, goal, want):
    losses = torch.tensor([[1.0, 1], [5, 3], [1, 3], [3, 1]]).double()  # means 1, 4, 2, 2; the start does not count
    assert Result("sgd", losses, final_steps=final_steps).steps_to(goal) == want


def losses_of(*curve, tasks=2):
    return torch.tensor(curve).double()[:, None].expand(-1, tasks)


@pytest.mark.parametrize("goal, want", [(0.5, None), (1.0, None), (1.5, 4), (2.0, 4), (3.0, 2), (9.0, 1)])
def test_steps_until_it_stays_below_a_loss(goal, want):
    assert Result("own", losses_of(8, 4, 2, 3, 1.5)).steps_below(goal) == want


def test_the_speed_up_is_a_share_of_steps_and_of_seconds():
    best = Result("adam", losses_of(8, 7, 6, 5, 3), seconds_per_step=0.5)
    fast = Result("learned", losses_of(8, 4, 2, 2, 2), seconds_per_step=1.0)
    assert fast.speed_up(best) == (0.5, 1.0) and best.speed_up(best) == (1.0, 1.0)
    assert Result("slow", losses_of(8, 2, 2, 2, 4), seconds_per_step=1.0).speed_up(best) == (math.inf, math.inf)
    assert math.isnan(Result("untimed", losses_of(8, 4, 2, 2, 2)).speed_up(best)[1])
    flat = Result("flat", losses_of(2, 1, 1, 1, 1))  # both are at the floor: the ratio of their losses says nothing
    assert flat.speed_up(Result("late", losses_of(2, 2, 2, 1.5, 1)))[0] == 0.25
    diverged = Result("diverged", losses_of(8, 2, math.inf, math.inf, math.inf))
    assert diverged.speed_up(best)[0] == diverged.speed_up(diverged)[0] == math.inf
    assert best.speed_up(diverged)[0] == 0.25


def test_references():
    results = [Result(name, torch.full((2, 3), value)) for name, value in (("sgd", 2.0), ("adam", 3.0))]
    assert best_final_loss(results) == 2 and adam_final_loss(results) == 3
    assert math.isnan(best_final_loss([])) and adam_final_loss(results[:1]) is None


def test_unseen_figures_are_means_in_the_row():
    unseen = {"loss": torch.tensor([1.0, 3]), "accuracy": torch.tensor([0.5, 1])}
    row = Result("sgd", torch.ones(2, 2), unseen=unseen).row(None, 1.0)
    assert row["unseen_loss"] == 2 and row["unseen_accuracy"] == 0.75 and row["steps_to_adam"] == 1


@pytest.mark.parametrize("q, want", [(0.25, 2), (0.5, math.inf), (0.3, math.inf), (0.0, 1), (0.9, math.inf)])
def test_quantiles_know_infinity(q, want):
    losses = torch.tensor([[math.inf, 1, math.inf, 2, math.inf]]).double()
    assert Result("sgd", losses).quantile(q).item() == want


def test_ratio():
    assert ratio(1.0, 4.0) == 0.25 and ratio(math.inf, 4.0) == math.inf
    assert all(math.isnan(ratio(1.0, reference)) for reference in (0.0, math.inf, math.nan))


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_files(tmp_path):
    losses = torch.tensor([[4.0, 4, 4], [1, 2, 6]]).double()
    results = [Result("learned", losses / 3), Result("sgd, fast", losses, 0.3, seconds_per_step=0.5)]
    write_comparison(tmp_path / "a.csv", results)
    learned, sgd = read(tmp_path / "a.csv")
    assert (learned["optimizer"], learned["lr"]) == ("learned", "")
    assert (sgd["optimizer"], sgd["lr"]) == ("sgd, fast", "0.3")
    numbers = {k: float(v) for k, v in sgd.items() if k not in ("optimizer", "lr", "steps_to_adam")}
    want = dict(final_loss=3, standard_error=math.sqrt(7 / 3), median=2, ratio=1, trajectory_loss=3, diverged=0)
    want |= {"quantile_0.1": 1.2, "quantile_0.9": 5.2, "seconds_per_step": 0.5}
    want |= {"share_of_steps": 1, "share_of_seconds": 1}
    assert numbers == pytest.approx(want | dict(num_tasks=3, num_steps=1, final_steps=1))
    assert float(learned["ratio"]) == pytest.approx(1 / 3) and learned["steps_to_adam"] == ""
    write_curves(tmp_path / "b.csv", results, (0.0, 0.5))
    rows = read(tmp_path / "b.csv")
    assert list(rows[0]) == ["optimizer", "step", "mean", "quantile_0", "quantile_0.5"]
    assert [row["step"] for row in rows] == ["0", "1", "0", "1"]
    assert list(rows[3].values()) == ["sgd, fast", "1", "3.0", "1.0", "2.0"]
    write_predictions(tmp_path / "c.csv", losses[:, :2])
    want = [("0", "0", "4.0"), ("0", "1", "1.0"), ("1", "0", "4.0"), ("1", "1", "2.0")]
    assert [tuple(row.values()) for row in read(tmp_path / "c.csv")] == want
