"""Episodes of several lengths, several of them under way at once."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim.lr_scheduler import LinearLR

from commandline import TINY_FIT
from lightning_l2l import (
    CoordinatewiseLSTM,
    EvolutionStrategies,
    Imitation,
    MetaOptimizer,
    Mixture,
    MixtureDataModule,
    NormalizedMLP,
    Quadratic,
    QuadraticDataModule,
    main,
)
from lightning_l2l.meta.underway import LOSS_WEIGHTS, drawn_length
from lightning_l2l.meta.unroll import Unroll


class Watch(Callback):
    """Writes down outer steps, lengths of ended episodes, and weights, batch by batch; stops after `stop`."""

    def __init__(self, stop=None, path=None):
        self.outer_steps, self.lengths, self.weights = [], [], []
        self.stop, self.path = stop, path

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.outer_steps.append(trainer.global_step)
        self.lengths.append(float(trainer.callback_metrics.get("train/num_steps", math.nan)))
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.rule.parameters()]))
        if len(self.outer_steps) == self.stop:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            raise KeyboardInterrupt


def module(rule=None, task=None, num_steps=12, **options):
    torch.manual_seed(0)
    return MetaOptimizer(task or Quadratic(3), rule or CoordinatewiseLSTM(4), num_steps, unroll_length=2, **options)


def quadratics(**options):
    return QuadraticDataModule(num_tasks=4, dim=3, episodes_per_epoch=5, num_val_tasks=4, eval_tasks=4, **options)


def fit(model, watch=None, epochs=2, data=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    given = {"inference_mode": False, "enable_checkpointing": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    watch = watch or Watch()
    trainer = Trainer(max_epochs=epochs, callbacks=[watch], **quiet, **given)
    try:
        trainer.fit(model, data or quadratics(), **options)
    except (KeyboardInterrupt, SystemExit):
        assert watch.stop
    return watch


# ---- lengths ----


def test_lengths_are_log_uniform_multiples_and_a_function_of_seed_and_batch():
    drawn = [drawn_length(20, 2000, 20, 0, (k // 50, k % 50)) for k in range(4000)]
    assert drawn == [drawn_length(20, 2000, 20, 0, (k // 50, k % 50)) for k in range(4000)]
    assert all(20 <= n <= 2000 and n % 20 == 0 for n in drawn)
    for n, share in ((65, 0.25), (205, 0.5), (650, 0.75)):  # between multiples of 20
        assert sum(one < n for one in drawn) / 4000 == pytest.approx(share, abs=0.05)
    assert drawn != [drawn_length(20, 2000, 20, 1, (k // 50, k % 50)) for k in range(4000)]


def test_episodes_have_lengths_from_the_shortest_to_the_longest():
    watch = fit(module(min_steps=2), epochs=6)
    assert set(watch.lengths) <= {2, 4, 6, 8, 10, 12} and len(set(watch.lengths)) > 3
    made = [after - before for before, after in zip([0, *watch.outer_steps], watch.outer_steps, strict=False)]
    assert made == [length / 2 for length in watch.lengths]


def test_a_length_is_that_of_such_an_episode():
    length = drawn_length(2, 12, 2, 0, (0, 0))
    assert 2 <= length < 12
    options = {"loss_weights": "linear", "optimizer": partial(torch.optim.Adam, eps=1e-30)}
    drawn, fixed = module(min_steps=2, **options), module(num_steps=length, **options)
    one = quadratics(num_steps=12)
    one.episodes_per_epoch = 1
    for model in (drawn, fixed):
        fit(model, epochs=1, data=one)
    for a, b in zip(drawn.rule.parameters(), fixed.rule.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert sum(drawn.weights_of(length)) == pytest.approx(12)  # counts as much as one of 12 steps
    assert sum(fixed.weights_of(length)) == pytest.approx(length)


@pytest.mark.parametrize("steps, counted", [(1, 1), (9, 1), (10, 1), (11, 2), (100, 10)])
def test_of_the_tail_alone_the_last_tenth_counts_with_mean_1(steps, counted):
    weights = LOSS_WEIGHTS["tail"](steps)
    assert len(weights) == steps and sum(weights) == pytest.approx(steps)
    assert weights == [0.0] * (steps - counted) + [weights[-1]] * counted


def test_truncations_of_which_nothing_counts_make_no_outer_step():
    watch = fit(module(loss_weights="tail"), epochs=1)  # 2 of 12 steps count: one truncation of 6
    assert watch.outer_steps == [1, 2, 3, 4, 5]


# ---- several at once ----


def test_an_outer_step_is_that_of_the_mean_of_their_meta_gradients():
    model = module(num_episodes=3, optimizer=partial(torch.optim.SGD, lr=1.0), lr=0.5, num_steps=2)
    before = [p.detach().clone() for p in model.rule.parameters()]
    unroll = Unroll(model.task, model.rule)
    data = quadratics(num_steps=2)
    data.setup()
    for number in range(3):
        unroll.run(unroll.start(data.train_dataloader().batch_of(0, number), num_steps=2), 2).meta_loss.backward()
    found = [p.grad / 3 for p in model.rule.parameters()]
    model.zero_grad()
    watch = fit(model, Watch(), epochs=1, data=quadratics())
    assert watch.outer_steps == [0, 0, 1, 1, 1]  # all three end together, and two more wait for a third
    for p, old, gradient in zip(model.rule.parameters(), before, found, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * gradient)


def test_they_are_at_different_steps_and_new_ones_take_the_place_of_those_that_end():
    model, seen = module(min_steps=2, num_episodes=3), []

    class Look(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            super().on_train_batch_end(trainer, pl_module)
            seen.append([(one.episode.step, len(one.weights)) for one in pl_module.underway])

    watch = fit(model, Look(), epochs=8)
    assert watch.outer_steps[:2] == [0, 0]
    assert all(len(one) <= 2 for one in seen) and all(step < num for one in seen for step, num in one)
    assert any(len({step for step, _ in one}) > 1 for one in seen)


def test_they_may_be_of_different_members_of_a_mixture():
    task = Mixture([Quadratic(3), Quadratic(5)])
    data = MixtureDataModule(
        [QuadraticDataModule(dim=3), QuadraticDataModule(dim=5)], num_tasks=4, episodes_per_epoch=6, num_val_tasks=8
    )
    model, widths = module(task=task, num_episodes=2, min_steps=2), set()

    class Look(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            widths.update(one.episode.parts[0].theta.shape[1] for one in pl_module.underway)

    fit(model, Look(), epochs=3, data=data)
    assert widths == {3, 5}


TEACHER = Imitation(0.5, partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(LinearLR, total_iters=9), epochs=9)
KINDS = {
    "first order": {},
    "imitation": {"imitation": TEACHER},
    "truncation": {"meta_gradient": EvolutionStrategies(lasts="truncation")},
    "episode": {"meta_gradient": EvolutionStrategies(lasts="episode")},
}


@pytest.mark.parametrize("stop", [4])
@pytest.mark.parametrize("rule", [lambda: CoordinatewiseLSTM(3), lambda: NormalizedMLP(hidden_size=3)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_episodes(kind, rule, stop, tmp_path):
    def make():
        torch.manual_seed(1)
        return module(rule(), min_steps=4, num_episodes=3, **KINDS[kind])

    straight = fit(make(), epochs=3)
    fit(make(), Watch(stop, tmp_path / "x.ckpt"), epochs=3)
    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["underway"][0]
    assert len(kept) in (1, 2) and (stop == 1 or any(0 < one["step"] < one["num_steps"] for one in kept))
    resumed = fit(make(), epochs=3, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert resumed.outer_steps == straight.outer_steps[stop:]
    for a, b in zip(straight.weights[stop:], resumed.weights, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_before_and_that_of_other_processes_begin_episodes_anew(tmp_path):
    fit(module(num_episodes=2, min_steps=2), Watch(4, tmp_path / "x.ckpt"))
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["underway"] = checkpoint["underway"] * 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="under way are left out"):
        watch = fit(module(num_episodes=2, min_steps=2), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert watch.outer_steps
    del checkpoint["underway"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert fit(module(), ckpt_path=tmp_path / "old.ckpt", weights_only=True).outer_steps


# ---- from the command line ----


def test_from_the_command_line(in_tmp_path):
    flags = ["--model.num_steps=8", "--model.unroll_length=2", "--model.min_steps=2", "--model.num_episodes=2"]
    main(["fit", *TINY_FIT, *flags])
    kept = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    assert kept["min_steps"] == 2 and kept["num_episodes"] == 2


@pytest.mark.parametrize(
    "options, told",
    [
        ({"min_steps": 3}, "min_steps=3"),
        ({"min_steps": 14}, "min_steps=14"),
        ({"min_steps": 0}, "min_steps=0"),
        ({"num_episodes": 0}, "num_episodes=0"),
        ({"num_episodes": 1.5}, "num_episodes=1.5"),
    ],
)
def test_what_cannot_be_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        module(**options)
