"""Rules that see their tensor: in the unroll, in the optimizer, and against plain autograd."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from commandline import TINY, TINY_FIT
from lightning_l2l import LearnedOptimizer, NormalizedMLP, TensorRule, main
from lightning_l2l.evaluation.rollout import SideBySide, rollout
from lightning_l2l.meta.first_order import FirstOrder
from lightning_l2l.meta.second_order import SecondOrder
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.rules.base import Seen
from lightning_l2l.rules.files import load_rule, save_rule
from lightning_l2l.rules.inputs import INPUTS, TIME
from lightning_l2l.rules.normalized import orthogonalized
from lightning_l2l.rules.tensors import Moment, TensorState
from lightning_l2l.tasks import MLP, ConvNet, NetworkTask
from optimizers import feed, gradients, normal, parameters, values

SHAPES = [(4, 3), (4,), (), (2, 3, 2, 2), (5, 1)]


class Remembering(TensorRule):
    """Momentum with a learned decay, divided by its size over the tensor, that pulls theta to 0 more and more."""

    state_size = 1

    def __init__(self):
        super().__init__()
        self.decay, self.log_lr, self.pull = (nn.Parameter(torch.tensor(v)) for v in (0.5, -2.0, 0.1))

    def vector_size(self, shape):
        return 1

    def forward(self, gradient, state, theta, moment):
        velocity = self.decay * state.coordinates[0] + gradient
        total = self.decay * state.vector + velocity.reshape(len(velocity), -1).square().sum(1, keepdim=True)
        whole = (-1, *[1] * (theta.dim() - 1))
        gone = moment.step / (100 if moment.num_steps is None else moment.num_steps)
        update = -self.log_lr.exp() * velocity / total.sqrt().view(whole) - self.pull * gone.view(whole) * theta
        return update, TensorState(velocity[None], total)


def stirred(rule):
    """With a last layer that is not zero."""
    with torch.no_grad():
        for k, parameter in enumerate(rule.parameters()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=50 + k).to(parameter))
    return rule


RULES = {
    "remembering": Remembering,
    "unlearned": lambda: NormalizedMLP(hidden_size=0),
    "no-schedule": lambda: NormalizedMLP(hidden_size=0, schedule="constant", warmup=0, step_size=0.01),
    "coordinates": lambda: NormalizedMLP(hidden_size=0, orthogonalize=False, normalize=False),
    "mlp": lambda: stirred(NormalizedMLP()),
    "mlp-sizes": lambda: stirred(
        NormalizedMLP(hidden_size=3, sizing=4, mixing=True, schedule="linear", floor=0.1, warmup=2)
    ),
    "sizes": lambda: stirred(NormalizedMLP(hidden_size=0, sizing=0, max_scale=5.0)),
    "mixing": lambda: stirred(NormalizedMLP(hidden_size=0, sizing=0, betas=[0.9, 0.5], mixing=True)),
    "mlp-some-inputs": lambda: stirred(NormalizedMLP(inputs=["ratio", "theta", "time"], betas=[0.8, 0.95])),
    "mlp-plain": lambda: stirred(NormalizedMLP(orthogonalize=False, normalize=False, step_size=0.02)),
    "mlp-untimed": lambda: stirred(NormalizedMLP(inputs=["mean_ratios", "factored"], orthogonalize=False)),
}


@pytest.fixture(params=RULES)
def rule(request):
    torch.manual_seed(0)
    return RULES[request.param]()


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    return RULES["mlp"]()


def batch(num_tasks, side=None):
    g = torch.Generator().manual_seed(2)
    features = (5,) if side is None else (3, side, side)
    inputs = torch.randn(num_tasks, 13, 8, *features, generator=g)
    targets = torch.randint(0, 3, (num_tasks, 13, 8), generator=g, dtype=torch.uint8)
    return {"inputs": inputs, "targets": targets, "seed": torch.arange(num_tasks)}


TASK = NetworkTask(MLP(5, 4, out_features=3))
DOUBLE = NetworkTask(MLP(5, 4, out_features=3).double())
CPU = torch.device("cpu")


def thetas(episode):
    return torch.cat([part.theta for part in episode.parts], 1)


# ---- the unroll and the optimizer do the same ----


@pytest.mark.parametrize("num_steps", [None, 8, 12])
def test_one_task_goes_bit_for_bit_as_the_optimizer_takes_a_model(rule, num_steps):
    given = batch(1)
    unroll = Unroll(TASK, rule)
    episode = unroll.start(given, num_steps=num_steps)
    params = [nn.Parameter(p[0].detach().clone()) for p in episode.params.values()]
    optimizer = LearnedOptimizer(params, rule, num_steps=num_steps)
    for step in range(12):
        unroll.run(episode, 1)
        named = {name: p[None] for name, p in zip(episode.params, params, strict=True)}
        optimizer.zero_grad()
        TASK.loss(named, given, step).sum().backward()
        optimizer.step()
        assert torch.equal(torch.cat([p.detach().flatten() for p in params]), thetas(episode)[0])


@pytest.mark.parametrize("task", ["mlp", "convolutions"])
def test_tasks_side_by_side_share_nothing(rule, task):
    made, given = TASK, batch(3)
    if task == "convolutions":
        net = ConvNet(image_size=4, channels=2, num_convs=1, hidden_size=3, out_features=3)
        made, given = NetworkTask(net), batch(3, side=4)
    unroll = Unroll(made, rule)
    together = unroll.start(given, num_steps=10)
    losses = unroll.run(together, 10).losses
    evaluated = rollout(lambda p: SideBySide(p, rule, num_steps=10), made, given, 10, CPU).losses[1:]
    torch.testing.assert_close(evaluated, losses, rtol=1e-5, atol=1e-6)
    for k in range(3):
        alone = unroll.start({name: values[k : k + 1] for name, values in given.items()}, num_steps=10)
        torch.testing.assert_close(unroll.run(alone, 10).losses[:, 0], losses[:, k], rtol=1e-4, atol=1e-5)


# ---- meta-gradients ----


def brute_force(rule, given, num_steps, known):
    """The first-order gradient by one graph of all steps, gradients and theta as the rule sees them cut from it."""
    episode = Unroll(DOUBLE, rule).start(given, num_steps=known)
    (part,) = episode.parts
    theta, state, total = part.theta.clone(), part.state, 0.0
    for step in range(num_steps):
        seen = Seen(theta.detach(), part.shapes, step, known)
        update, state = rule.updates(gradient_at(theta, episode, given, step), state, seen)
        theta = theta + update.view_as(theta)
        total = total + DOUBLE.loss(named(theta, episode), given, step + 1).mean()
    return torch.autograd.grad(total, list(rule.parameters()), materialize_grads=True)


def named(theta, episode):
    sizes = [math.prod(shape) for shape in episode.parts[0].shapes]
    cut = theta.split(sizes, 1)
    return {
        name: one.view(-1, *shape)
        for name, one, shape in zip(episode.params, cut, episode.parts[0].shapes, strict=True)
    }


def gradient_at(theta, episode, given, step):
    leaf = theta.detach().requires_grad_()
    return torch.autograd.grad(DOUBLE.loss(named(leaf, episode), given, step).sum(), leaf)[0].flatten()


@pytest.mark.parametrize("which", [name for name in RULES if name == "remembering" or name.startswith("mlp")])
@pytest.mark.parametrize("known", [None, 6])
def test_first_order_is_what_brute_force_finds(which, known):
    torch.manual_seed(0)
    rule, given = RULES[which]().double(), batch(2)
    given["inputs"] = given["inputs"].double()
    wanted = brute_force(rule, given, 6, known)
    unroll = Unroll(DOUBLE, rule, FirstOrder())
    unroll.run(unroll.start(given, num_steps=known), 6).meta_loss.backward()
    assert any(bool(one.abs().max() > 1e-6) for one in wanted)
    for parameter, one in zip(rule.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-9, atol=1e-12)


def test_second_order_sees_theta_and_the_moment(mlp):
    rule, given = mlp.double(), batch(2)
    given["inputs"] = given["inputs"].double()
    losses = []
    for step in (1e-6, -1e-6, 0.0):
        other = copy.deepcopy(rule)
        with torch.no_grad():
            other.readout.bias += step
        unroll = Unroll(DOUBLE, other, SecondOrder())
        found = unroll.run(unroll.start(given, num_steps=5), 5)
        losses.append(float(found.meta_loss.detach()))
    found.meta_loss.backward()
    assert float(other.readout.bias.grad) == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4)


# ---- NormalizedMLP ----


def one_step(rule, gradient, theta=None, step=0, num_steps=100, state=None):
    state = rule.init_tensor(gradient.shape[1:], len(gradient)) if state is None else state
    moment = Moment(torch.full((len(gradient),), float(step)), torch.full((len(gradient),), float(num_steps)))
    return rule(gradient, state, torch.zeros_like(gradient) if theta is None else theta, moment)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 2, 2, 2), (7,), ()])
def test_an_update_has_the_size_of_the_rate(shape):
    rule = NormalizedMLP(hidden_size=0, warmup=0)
    update, _ = one_step(rule, normal(2, *shape, seed=1), num_steps=400)
    torch.testing.assert_close(update.reshape(2, -1).square().mean(1).sqrt(), torch.full((2,), 0.13 / 20))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 2, 2, 2)])
def test_matrices_are_orthogonalised(shape):
    spread = {}
    for orthogonalize in (True, False):
        rule, state = NormalizedMLP(hidden_size=0, orthogonalize=orthogonalize), None
        for step in range(4):  # the first is of signs alone, which may have fewer ranks
            update, state = one_step(rule, normal(2, *shape, seed=step), step=step, state=state)
        sizes = torch.linalg.svdvals(update.flatten(2))
        spread[orthogonalize] = sizes.amax(1) / sizes.amin(1)
    assert bool((spread[True] < 1.9).all()) and bool((spread[False] > 2.2).all())


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (4, 4)])
def test_newton_schulz_is_that_of_torchs_muon(shape):
    muon = pytest.importorskip("torch.optim._muon")
    matrix = normal(*shape, seed=3)
    wanted = muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)  # in bfloat16
    torch.testing.assert_close(orthogonalized(matrix[None])[0], wanted.float(), rtol=0.1, atol=0.03)


def test_with_a_last_layer_of_zeros_it_is_the_unlearned_one():
    torch.manual_seed(0)
    for options in ({}, {"orthogonalize": False}, {"sizing": 3}, {"sizing": 0}):
        learned = NormalizedMLP(**options)
        options.pop("sizing", None)
        unlearned = NormalizedMLP(hidden_size=0, **options)
        params, others = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
        given = gradients(params, 5)
        feed(LearnedOptimizer(params, learned, num_steps=5), params, given)
        feed(LearnedOptimizer(others, unlearned, num_steps=5), others, given)
        for a, b in zip(params, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1e4])
def test_the_unit_of_the_loss_does_not_matter(unit):
    torch.manual_seed(0)
    rule = stirred(NormalizedMLP(inputs=[name for name in INPUTS if name != "clipped"], eps=1e-20))
    params, others = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    given = gradients(params, 5)
    feed(LearnedOptimizer(params, rule), params, given)
    feed(LearnedOptimizer(others, rule), others, [[unit * g for g in step] for step in given])
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["unlearned", "coordinates", "mlp", "mlp-sizes", "sizes", "mlp-plain"])
def test_what_never_had_a_gradient_is_not_moved(name):
    torch.manual_seed(0)
    rule = RULES[name]()
    params = parameters(shapes=[(6, 4), (5,)])
    start, given = values(params), gradients(params, 6)
    for step in given:
        step[0][2] = 0.0  # a row of an embedding that is in no minibatch
        step[0][4, 1] = 0.0  # a weight that is pruned
        step[1][3] = 0.0
    given[5][1][3] = 1.0
    optimizer = LearnedOptimizer(params, rule)
    feed(optimizer, params, given[:5])
    still = [(params[0] == start[0]).detach(), (params[1] == start[1]).detach()]
    assert still[0][2].all() and still[0][4].tolist() == [False, True, False, False] and int(still[0].sum()) == 5
    assert still[1].tolist() == [False, False, False, True, False]
    feed(optimizer, params, given[5:])
    assert params[1][3] != start[1][3]


def test_a_gradient_of_zeros_moves_nothing_and_makes_no_nan(rule):
    params = parameters(shapes=SHAPES)
    start = values(params)
    feed(LearnedOptimizer(params, rule), params, [[torch.zeros_like(p) for p in params]] * 3)
    for p, before in zip(params, start, strict=True):
        assert torch.equal(p, before) or isinstance(rule, Remembering)


@pytest.mark.parametrize("size", [1e-12, 1e-5, 1e8, 1e19, 3e38])
@pytest.mark.parametrize("name", [name for name in RULES if name != "remembering"])
def test_gradients_of_any_size_give_finite_updates(name, size):
    torch.manual_seed(0)
    rule = RULES[name]()
    params = parameters(shapes=SHAPES)
    feed(LearnedOptimizer(params, rule), params, [[size * g.clamp(-1, 1) for g in s] for s in gradients(params, 3)])
    assert all(bool(p.isfinite().all()) for p in params)


def test_the_rate_rises_falls_to_its_floor_and_stays_there():
    def rates(num_steps, steps, **options):
        rule = NormalizedMLP(hidden_size=0, **options)
        clock = None if num_steps is None else torch.full((1,), float(num_steps))
        return [float(rule.rate(Moment(torch.full((1,), float(step)), clock))) for step in steps]

    peak = 0.13 / 10
    assert rates(100, [0, 9, 500], schedule="constant") == pytest.approx([peak / 20, peak / 2, peak])
    assert rates(None, [0, 500], schedule="constant", step_size=0.5, warmup=0) == [0.5, 0.5]
    assert rates(100, [50, 100, 5000], warmup=0) == pytest.approx([peak / 2, 0, 0], abs=1e-9)
    assert rates(100, [50, 100, 5000], warmup=0, floor=0.1) == pytest.approx([0.55 * peak, 0.1 * peak, 0.1 * peak])
    assert rates(100, [25, 99], warmup=0, schedule="linear") == pytest.approx([0.75 * peak, 0.01 * peak], rel=1e-4)
    assert rates(100, [0], warmup=0, step_size=0.5) == pytest.approx([0.5])
    anytime = rates(None, [100, 1000, 10_000, 100_000])
    assert anytime == sorted(anytime, reverse=True)
    assert anytime[3] == pytest.approx(anytime[2] / 10, rel=0.02)


def test_weight_decay_is_multiplied_by_the_rate():
    params = [nn.Parameter(torch.ones(3))]
    rule = NormalizedMLP(hidden_size=0, warmup=0, schedule="constant", step_size=0.01)
    feed(LearnedOptimizer(params, rule, lr=0.5, weight_decay=0.1), params, [[torch.zeros(3)]] * 2)
    torch.testing.assert_close(params[0].detach(), torch.full((3,), (1 - 0.5 * 0.1 * 0.01) ** 2), rtol=0, atol=1e-7)


def test_the_moment_is_the_optimizers_and_comes_back_with_its_state(mlp):
    params, straight = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    given = gradients(params, 6)
    feed(LearnedOptimizer(straight, mlp, num_steps=6), straight, given)
    optimizer = LearnedOptimizer(params, mlp, num_steps=6)
    feed(optimizer, params, given[:3])
    twin = LearnedOptimizer(params, mlp)  # the saved number of steps is taken
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    feed(twin, params, given[3:])
    for a, b in zip(params, straight, strict=True):
        assert torch.equal(a, b)


def test_parameters_that_join_later_are_as_far_as_all_others():
    rule = NormalizedMLP(hidden_size=0, warmup=0)
    first, late = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = LearnedOptimizer([first], rule, num_steps=4)
    feed(optimizer, [first], [[torch.ones(3)]] * 2)
    before = first.detach().clone()
    optimizer.add_param_group({"params": [late]})
    feed(optimizer, [first, late], [[torch.ones(3)] * 2])
    torch.testing.assert_close(late.detach(), first.detach() - before)
    assert [int(optimizer.state[p]["step"]) for p in (first, late)] == [3, 3]
    optimizer.state.clear()  # and without its state it is as new
    feed(optimizer, [first, late], [[torch.ones(3)] * 2])
    assert int(optimizer.state[late]["step"]) == 1


@pytest.mark.cuda
def test_on_a_gpu_it_goes_where_it_goes_on_the_cpu(rule):
    wanted = parameters(shapes=SHAPES)
    params = [nn.Parameter(p.detach().cuda()) for p in wanted]
    for run in (params, wanted):
        optimizer = LearnedOptimizer(run, rule, num_steps=9, weight_decay=2**-8)
        feed(optimizer, run, gradients(run, 7))
        assert all(optimizer.state[p]["tensor_state"].device == p.device for p in run)
    torch.testing.assert_close([p.cpu() for p in params], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_steps", [0, -1, 1.5, True, "10"])
def test_a_number_of_steps_that_is_none_is_refused(num_steps, mlp):
    with pytest.raises(ValueError, match="num_steps="):
        LearnedOptimizer(parameters(), mlp, num_steps=num_steps)


def test_a_rule_that_needs_the_number_of_steps_says_so():
    rule = NormalizedMLP(hidden_size=0, schedule="constant")
    with pytest.raises(ValueError, match="give num_steps=10_000"):
        LearnedOptimizer(parameters(), rule)
    LearnedOptimizer(parameters(), rule, num_steps=3)


def test_it_goes_through_a_rule_file(tmp_path, rule):
    if not isinstance(rule, NormalizedMLP):
        pytest.skip("a class of this file")
    save_rule(rule, tmp_path / "rule.npz")
    loaded = load_rule(tmp_path / "rule.npz")
    params, others = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    given = gradients(params, 2)
    feed(LearnedOptimizer(params, rule), params, given)
    feed(LearnedOptimizer(others, loaded), others, given)
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)


def test_16_bytes_of_state_a_parameter_and_the_vectors():
    rule = NormalizedMLP()
    assert (rule.state_size, rule.vector_size((7, 5)), rule.vector_size((7,))) == (4, 1 + 3 * 12, 1)
    assert NormalizedMLP(hidden_size=0).state_size == 2
    rule = NormalizedMLP(hidden_size=0, sizing=0)
    assert (rule.state_size, rule.vector_size((7, 5)), rule.vector_size((7,))) == (4, 2, 2)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"hidden_size": -1}, "hidden_size=-1"),
        ({"inputs": ["speed"]}, "inputs='speed' is unknown; use one of gradient, "),
        ({"betas": [1.0]}, "betas=1.0"),
        ({"betas": []}, "betas are no numbers"),
        ({"beta2": -0.1}, "beta2=-0.1"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"floor": 2.0}, "floor=2.0"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"max_scale": 1.0}, "max_scale=1.0"),
        ({"sizing": -1}, "sizing=-1"),
        ({"sizing": True}, "sizing=True"),
        ({"warmup": -1}, "warmup=-1"),
    ],
)
def test_arguments_out_of_range_are_refused(options, told):
    with pytest.raises(ValueError, match=told.replace("[", r"\[")):
        NormalizedMLP(**options)


def test_each_input_alone_makes_a_rule():
    for name in (*INPUTS, TIME):
        torch.manual_seed(0)
        rule = stirred(NormalizedMLP(inputs=[name]))
        params = parameters(shapes=SHAPES)
        feed(LearnedOptimizer(params, rule, num_steps=4), params, gradients(params, 4))
        assert all(bool(p.isfinite().all()) for p in params), name


# ---- from the command line, and with Lightning ----

TINY_MLP = [
    "--model.rule=lightning_l2l.NormalizedMLP",
    "--model.rule.hidden_size=6",
    "--model.rule.inputs=[ratio, theta, time]",
    *(flag for flag in TINY_FIT if "hidden_size" not in flag and "epochs" not in flag),
    "--curves.baselines=[]",
    "--model.anneal=false",
]


def test_it_is_meta_trained_goes_on_bit_for_bit_and_is_tested(in_tmp_path):
    main(["fit", *TINY_MLP, "--trainer.max_epochs=4", "--trainer.default_root_dir=straight"])
    main(["fit", *TINY_MLP, "--trainer.max_epochs=2", "--trainer.default_root_dir=cut"])
    main(["fit", *TINY_MLP, "--trainer.max_epochs=4", "--trainer.default_root_dir=cut", "--ckpt_path=last"])
    a, b = (load_rule(f"{folder}/lightning_logs/version_0/checkpoints/last.ckpt") for folder in ("straight", "cut"))
    start = NormalizedMLP(hidden_size=6, inputs=["ratio", "theta", "time"])
    assert bool(a.readout.weight.any()) and not bool(start.readout.weight.any())
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(one, other)
    last = "straight/lightning_logs/version_0/checkpoints/last.ckpt"
    main(["test", "--config=straight/lightning_logs/version_0/config.yaml", f"--ckpt_path={last}"])


def test_the_unlearned_one_is_compared_with_what_people_use_but_not_meta_trained(in_tmp_path, capsys):
    save_rule(NormalizedMLP(hidden_size=0), in_tmp_path / "unlearned.npz")
    sizes = [flag for flag in TINY if "hidden_size" not in flag]
    main(["test", "--ckpt_path=unlearned.npz", *sizes, "--curves.baselines=[adamw_cosine, muon_cosine, schedulefree]"])
    told = capsys.readouterr().out
    for name in ("learned", "adamw_cosine", "muon_cosine", "schedulefree"):
        assert f"  {name} " in told
    with pytest.raises(ValueError, match="has no parameters to meta-train"):
        main(["fit", "--model.rule=lightning_l2l.NormalizedMLP", "--model.rule.hidden_size=0", *TINY_MLP[3:]])


class Regression(LightningModule):
    """A model as users have one, whose optimizer is told how many steps the trainer will make."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)

    def training_step(self, batch):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        num_steps = self.trainer.estimated_stepping_batches
        return LearnedOptimizer(self.parameters(), NormalizedMLP(hidden_size=0), num_steps=num_steps)


class Interrupted(Callback):
    """Ends a run after two epochs."""

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_lightning_tells_the_number_of_steps_and_goes_on_at_the_moment(in_tmp_path):
    def fit(*callbacks, resume=None):
        torch.manual_seed(0)
        model = Regression()
        loader = DataLoader(TensorDataset(normal(12, 3, seed=1), normal(12, 2, seed=2)), batch_size=4)
        options = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_model_summary": False}
        Trainer(max_epochs=4, callbacks=list(callbacks), **options).fit(model, loader, ckpt_path=resume)
        return model

    straight = fit(ModelCheckpoint("straight"))
    optimizer = straight.trainer.optimizers[0]
    assert optimizer.param_groups[0]["num_steps"] == 12
    assert [int(state["step"]) for state in optimizer.state.values()] == [12, 12]
    cut = fit(ModelCheckpoint("cut", save_last=True), Interrupted())
    assert [int(state["step"]) for state in cut.trainer.optimizers[0].state.values()] == [6, 6]
    again = fit(ModelCheckpoint("cut"), resume=in_tmp_path / "cut" / "last.ckpt")
    for a, b in zip(again.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)
