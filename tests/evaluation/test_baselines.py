import math

import pytest
import torch
from torch.optim import Optimizer

from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, Quadratic, QuadraticDataModule
from lightning_l2l.evaluation.baselines import BASELINES, GRID, Baseline, find_baselines, tune
from lightning_l2l.evaluation.results import Result
from lightning_l2l.evaluation.rollout import rollout
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.tasks import Task, init_from_seeds

CPU = torch.device("cpu")
NUM_STEPS = 7
BY_NAME = {baseline.name: baseline for baseline in BASELINES}


@pytest.fixture
def task():
    return Quadratic(3)


@pytest.fixture
def batches():
    return list(QuadraticDataModule(num_tasks=4, dim=3, num_val_tasks=6).val_dataloader())


# The definition of each baseline once more, in torch.optim's own words.
PLAIN = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.03),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.03),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.03),
    "nag": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03),
}


@pytest.mark.parametrize("name", PLAIN)
def test_rollout_is_a_plain_loop_over_tasks(task, batches, name):
    losses = rollout(BY_NAME[name].at(0.03), task, batches[0], NUM_STEPS, CPU).losses
    assert losses.shape == (NUM_STEPS + 1, 4)
    for k in range(4):
        start, _ = init_from_seeds(task, batches[0]["seed"][k : k + 1])
        theta = torch.nn.Parameter(start["theta"][0])
        W, y = batches[0]["W"][k], batches[0]["y"][k]
        optimizer = PLAIN[name]([theta])
        for t in range(NUM_STEPS + 1):
            loss = (W @ theta - y).square().sum()
            torch.testing.assert_close(losses[t, k], loss.detach(), rtol=1e-4, atol=1e-5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_the_learning_rate_of_a_baseline_may_have_a_schedule(task, batches):
    def halving(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    falling = Baseline("falling", torch.optim.SGD, schedule=halving)
    losses = rollout(falling.at(0.03), task, batches[0], NUM_STEPS, CPU).losses[:, :1]
    start, _ = init_from_seeds(task, batches[0]["seed"][:1])
    theta = start["theta"][0]
    W, y = batches[0]["W"][0], batches[0]["y"][0]
    for t in range(NUM_STEPS + 1):
        torch.testing.assert_close(losses[t, 0], (W @ theta - y).square().sum(), rtol=1e-4, atol=1e-5)
        theta = theta - 0.03 * 0.5**t * 2 * W.T @ (W @ theta - y)


def test_learned_optimizer_goes_the_way_of_the_unroll_exactly(task, batches):
    rule = CoordinatewiseLSTM(hidden_size=4, output_scale=0.3)
    losses = rollout(lambda params: LearnedOptimizer(params, rule), task, batches[0], 6, CPU).losses
    unroll = Unroll(task, rule)
    episode = unroll.start(batches[0])
    want = [episode.losses[None], *(unroll.run(episode, 3).losses for _ in range(2))]
    assert torch.equal(losses, torch.cat(want))


class Floor(Task):
    """f(theta) = 1 + |theta|, started at 0: the loss tells how far the optimizer went."""

    def init_params(self, num_tasks, generator):
        return {"theta": torch.zeros(num_tasks)}

    def loss(self, params, batch, step):
        return 1 + params["theta"].abs()


class Rated(Optimizer):
    """Jumps to |log10(lr / best)|, so that the learning rate `best` is the best one."""

    def __init__(self, params, lr, best=1.0):
        self.distance = abs(math.log10(lr / best))
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.fill_(self.distance)


class Exploding(Optimizer):
    """Every other task diverges, to nan or to -inf, unless the learning rate is below `limit`."""

    def __init__(self, params, lr, limit=0.0):
        self.lr, self.limit = lr, limit
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        if self.lr >= self.limit:
            for p in self.param_groups[0]["params"]:
                p[::4], p[2::4] = math.nan, -math.inf


def seeds(*sizes):
    return [{"seed": torch.arange(size)} for size in sizes]


def test_grid_is_written_as_one_would_write_it():
    assert GRID == (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def test_tuning_finds_the_best_of_the_grid():
    tuned = tune(Baseline("rated", Rated, {"best": 0.1}), Floor(), seeds(3, 2), 2, CPU)
    assert tuned.lr == 0.1 and tuned.final_loss == 1
    assert tuple(tuned.tried) == GRID
    assert tuned.tried[0.3] == pytest.approx(1 + math.log10(3))
    assert torch.equal(torch.cat([run.losses for run in tuned.rollouts], 1), torch.ones(3, 5))


@pytest.mark.parametrize("best, beyond", [(3e-5, (1e-5, 3e-5, 1e-4, 3e-4)), (100.0, (10.0, 30.0, 100.0, 300.0))])
def test_tuning_widens_the_grid_until_the_best_is_inside(best, beyond):
    tuned = tune(Baseline("rated", Rated, {"best": best}), Floor(), seeds(2), 1, CPU)
    assert tuned.lr == best
    assert tuple(tuned.tried) == tuple(sorted(GRID + beyond))


class Turning(Optimizer):
    """Goes to 1 at its first step, and to what the learning rate says at its second."""

    def __init__(self, params, lr):
        self.lr, self.steps = lr, 0
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            p.fill_({1: 10 * self.lr, 2: 1 / self.lr}[self.steps])


@pytest.mark.parametrize("final_steps, lr", [(1, 3.0), (2, 0.3)])
def test_tuning_is_by_the_mean_of_the_last_steps(final_steps, lr):
    tuned = tune(Baseline("turning", Turning), Floor(), seeds(2), 2, CPU, final_steps=final_steps, max_widenings=0)
    assert tuned.lr == lr
    assert tuned.final_loss == pytest.approx(1 + (1 / lr + (final_steps == 2) * 10 * lr) / final_steps)


class Watched(Floor):
    """Tells how far it went in place of data that it was not trained on."""

    def unseen(self, params, batch):
        assert not params["theta"].requires_grad
        return {"loss": params["theta"] + batch["seed"]}


def test_rollout_measures_time_and_what_is_unseen():
    run = rollout(Baseline("rated", Rated).at(10.0), Watched(), *seeds(3), 2, CPU)
    assert run.unseen["loss"].tolist() == [1, 2, 3]
    assert 0 < run.seconds < 60
    assert rollout(Baseline("rated", Rated).at(10.0), Floor(), *seeds(3), 2, CPU).unseen == {}


def test_tuning_stops_widening_after_a_while():
    tuned = tune(Baseline("rated", Rated, {"best": 1e9}), Floor(), seeds(2), 1, CPU, max_widenings=3)
    assert tuned.lr == 100 and len(tuned.tried) == len(GRID) + 3


def test_a_baseline_with_a_learning_rate_of_its_own_keeps_to_it():
    tuned = tune(Baseline("rated", Rated, {"best": 0.1}, lr=0.02), Floor(), seeds(3), 1, CPU)
    assert tuned.lr == 0.02 and list(tuned.tried) == [0.02]
    assert tuned.final_loss == pytest.approx(1 + math.log10(5))


def test_tuning_escapes_from_a_grid_where_everything_diverges():
    exploding = Baseline("exploding", Exploding, {"limit": 5e-4}, apart=False)
    tuned = tune(exploding, Floor(), seeds(4), 1, CPU, max_widenings=2)
    assert tuned.lr == 1e-4 and tuned.tried[0.001] == math.inf and tuned.final_loss == 1


def test_tuning_averages_over_ranks():
    over_all = iter([3.0, 2.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0])  # whatever this rank's own losses are

    def mean(own):
        return torch.tensor(next(over_all))

    tuned = tune(Baseline("rated", Rated), Floor(), seeds(2), 1, CPU, mean_over_ranks=mean)
    assert tuned.lr == GRID[2] and tuned.final_loss == 1


def test_a_diverged_run_counts_as_infinite():
    losses = rollout(Baseline("exploding", Exploding, apart=False).at(1.0), Floor(), *seeds(5), 2, CPU).losses
    infinite, one = [1.0, math.inf, math.inf], [1.0, 1.0, 1.0]
    assert losses.T.tolist() == [infinite, one, infinite, one, infinite]
    result = Result("exploding", losses.double())
    assert result.diverged == pytest.approx(0.6)
    assert result.final_loss == math.inf and result.final_quantile(0.5) == math.inf
    assert math.isnan(result.final_standard_error)


def test_inference_mode_is_refused_with_the_remedy(task, batches):
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use Trainer\(inference_mode=False\)"):
        rollout(BY_NAME["sgd"].at(0.1), task, batches[0], 1, CPU)


def test_baselines_by_name_and_by_class():
    own = Baseline("adagrad", torch.optim.Adagrad, {"eps": 0.1})
    assert find_baselines(["nag", own]) == (BY_NAME["nag"], own)


@pytest.mark.parametrize(
    "given, message",
    [
        (["adamm"], "unknown baseline 'adamm'; use adam, rmsprop, sgd, nag, adamw, .*prodigy, .*torch.optim.Adagrad"),
        (["sgd", "sgd"], "the name 'sgd' is taken"),
        ([Baseline("learned", torch.optim.SGD)], "the name 'learned' is taken"),
    ],
)
def test_bad_baselines(given, message):
    with pytest.raises(ValueError, match=message):
        find_baselines(given, reserved=("learned",))


@pytest.mark.parametrize("name", ["a/b", "..", "", "a\nb", "a\\b"])
def test_a_baseline_whose_name_cannot_name_a_folder_is_refused(name):
    with pytest.raises(ValueError, match="cannot name a folder"):
        Baseline(name, torch.optim.SGD)
