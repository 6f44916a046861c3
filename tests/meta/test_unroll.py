import pytest
import torch
from torch import nn

from lightning_l2l import FirstOrder, Imitation, SecondOrder
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.rules import CoordinatewiseLSTM, RNNprop, RuleGroups
from lightning_l2l.tasks import MLP, NetworkTask, Quadratic, Task, init_from_seeds

NUM_STEPS, UNROLL = 6, 3
NAMES = ("fast", "flat", "second order")


def data(task, num_tasks):
    g = torch.Generator().manual_seed(5)
    seeds = torch.arange(3, 3 + num_tasks)
    if isinstance(task, Quadratic):
        W = torch.randn(num_tasks, task.dim, task.dim, generator=g, dtype=torch.float64)
        return {"W": W, "y": torch.randn(num_tasks, task.dim, generator=g, dtype=torch.float64), "seed": seeds}
    inputs = torch.randn(num_tasks, NUM_STEPS + 1, 8, 5, generator=g, dtype=torch.float64)
    return {"inputs": inputs, "targets": torch.randint(0, 3, (num_tasks, NUM_STEPS + 1, 8), generator=g), "seed": seeds}


class DoubleQuadratic(Quadratic):
    def init_params(self, num_tasks, generator):
        return {k: v.double() for k, v in super().init_params(num_tasks, generator).items()}


def batch_norm_net():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()


TASKS = {
    "quadratic": lambda: DoubleQuadratic(4),
    "mlp": lambda: NetworkTask(MLP(5, 4, out_features=3).double()),
    "batch-norm": lambda: NetworkTask(batch_norm_net()),
}


@pytest.fixture(params=TASKS)
def task(request):
    torch.manual_seed(0)
    return TASKS[request.param]()


def groups():
    return RuleGroups({"*weight": CoordinatewiseLSTM(hidden_size=5, output_scale=0.5), "!*weight": RNNprop(3)})


@pytest.fixture(params=[lambda: CoordinatewiseLSTM(hidden_size=5, output_scale=0.5), groups], ids=["lstm", "groups"])
def rule(request):
    torch.manual_seed(0)
    return request.param().double()


def brute_force(task, rule, batch, num_steps, start=None, state=None, detach=True, weights=None, log=False):
    """The meta-loss of one truncation, summed term by term with one graph through all of it."""
    params, buffers = init_from_seeds(task, batch["seed"])
    params = start or params
    num_tasks = len(batch["seed"])
    groups = rule.by_name(list(params))
    if state is None:
        state = [one.init_state(sum(params[k].numel() for k in names), dtype=torch.float64) for one, names in groups]
    meta_loss, losses = 0.0, []
    for t in range(num_steps):
        leaves = {k: (v.detach().requires_grad_() if detach or t == 0 else v) for k, v in params.items()}
        loss = task.loss({**leaves, **buffers}, batch, t).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=not detach)
        of_name, before, params, state = dict(zip(leaves, gradients, strict=True)), params, {}, list(state)
        for k, (one, names) in enumerate(groups):
            # coordinates are ordered task by task, and by parameter within a task
            flat = torch.cat([of_name[name].reshape(num_tasks, -1) for name in names], 1).flatten()
            update, state[k] = one(flat, state[k])
            parts = update.view(num_tasks, -1).split([before[name][0].numel() for name in names], 1)
            params |= {name: before[name] + u.view(before[name].shape) for name, u in zip(names, parts, strict=True)}
        after = task.loss({**params, **buffers}, batch, t + 1)
        losses.append(after.detach())
        term = after.mean().log() if log else after.mean()
        meta_loss = meta_loss + term * (weights[t] if weights else 1)
    return meta_loss, torch.stack(losses), params, state


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("memory, block", [("fast", None), ("flat", None), ("fast", 16), ("flat", 7)])
def test_meta_gradient_is_brute_force_autograd_with_gradients_detached(task, rule, num_tasks, memory, block):
    batch = data(task, num_tasks)
    meta_loss, losses, _, _ = brute_force(task, rule, batch, NUM_STEPS)
    want = torch.autograd.grad(meta_loss, list(rule.parameters()), materialize_grads=True)

    unroll = Unroll(task, rule, FirstOrder(memory, block=block))
    result = unroll.run(unroll.start(batch), NUM_STEPS)
    result.meta_loss.backward()
    torch.testing.assert_close(result.losses, losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.meta_loss, meta_loss, rtol=1e-10, atol=1e-12)
    for parameter, gradient in zip(rule.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.cuda
@pytest.mark.parametrize("meta_gradient", [FirstOrder("fast"), FirstOrder("flat"), SecondOrder()], ids=NAMES)
def test_on_a_gpu_the_meta_gradient_is_that_of_the_cpu(task, rule, meta_gradient):
    ends = []
    for device in ("cpu", "cuda"):
        unroll = Unroll(task, rule.to(device), meta_gradient)
        batch = {name: entry.to(device) for name, entry in data(task, 3).items()}
        result = unroll.run(unroll.start(batch), NUM_STEPS)
        assert result.losses.device.type == device
        result.meta_loss.backward()
        gradients = [p.grad.cpu() for p in rule.parameters() if p.grad is not None]
        ends.append([result.losses.cpu(), result.meta_loss.detach().cpu(), *gradients])
        rule.zero_grad()
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("order", [FirstOrder, SecondOrder])
@pytest.mark.parametrize("log", [False, True])
def test_meta_gradient_of_a_weighted_meta_loss(order, log):
    torch.manual_seed(0)
    task, rule = TASKS["mlp"](), CoordinatewiseLSTM(hidden_size=5, output_scale=0.5).double()
    batch, weights = data(task, 3), [0.0, 0.3, 2.0, -1.0, 0.0, 4.0]
    meta_loss, *_ = brute_force(task, rule, batch, NUM_STEPS, detach=order is FirstOrder, weights=weights, log=log)
    want = torch.autograd.grad(meta_loss, list(rule.parameters()), materialize_grads=True)
    unroll = Unroll(task, rule, order(), log_loss=log)
    result = unroll.run(unroll.start(batch), NUM_STEPS, weights)
    result.meta_loss.backward()
    torch.testing.assert_close(result.meta_loss, meta_loss, rtol=1e-10, atol=1e-12)
    for parameter, gradient in zip(rule.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="2 weights for num_steps=3"):
        unroll.run(unroll.start(batch), 3, [1.0, 1.0])


def test_second_truncation_carries_parameters_and_state_over_but_no_graph(task, rule):
    batch = data(task, 2)
    _, _, params, state = brute_force(task, rule, batch, UNROLL)
    shifted = {k: v[:, UNROLL:] if k in ("inputs", "targets") else v for k, v in batch.items()}
    meta_loss, losses, _, _ = brute_force(
        task, rule, shifted, UNROLL, {k: v.detach() for k, v in params.items()}, [s.detach() for s in state]
    )
    want = torch.autograd.grad(meta_loss, list(rule.parameters()), materialize_grads=True)

    unroll = Unroll(task, rule)
    episode = unroll.start(batch)
    unroll.run(episode, UNROLL)
    result = unroll.run(episode, UNROLL)
    result.meta_loss.backward()
    assert episode.step == NUM_STEPS
    torch.testing.assert_close(result.losses, losses, rtol=1e-10, atol=1e-12)
    for parameter, gradient in zip(rule.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


def meta_loss_of(task, rule, batch):
    """Both truncations' meta-losses at fixed meta-parameters, as a number."""
    with torch.no_grad():
        unroll = Unroll(task, rule)
        return unroll.run(unroll.start(batch), NUM_STEPS).meta_loss.item()


def test_second_derivatives_give_the_gradient_of_finite_differences(task, rule):
    if any(isinstance(m, nn.BatchNorm1d) for m in getattr(task, "module", nn.Identity()).modules()):
        pytest.skip("running statistics differ between two evaluations of the same start")
    batch = data(task, 2)
    unroll = Unroll(task, rule, SecondOrder())
    unroll.run(unroll.start(batch), NUM_STEPS).meta_loss.backward()
    g = torch.Generator().manual_seed(9)
    for parameter in rule.parameters():
        direction = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(meta_loss_of(task, rule, batch))
                parameter.sub_(direction, alpha=sign * 1e-6)
        slope = (values[0] - values[1]) / 2e-6
        found = 0.0 if parameter.grad is None else (parameter.grad * direction).sum().item()  # of no part of this task
        assert found == pytest.approx(slope, rel=2e-5, abs=1e-8)


@pytest.mark.parametrize("rule", [CoordinatewiseLSTM, RNNprop])
def test_second_derivatives_are_finite_where_a_gradient_is_zero(rule):
    torch.manual_seed(0)
    rule = rule(hidden_size=3).double()
    task = NetworkTask(MLP(5, 4, out_features=3).double())
    batch = data(task, 2)
    batch["inputs"][..., 2] = 0  # as at the borders of MNIST's images
    unroll = Unroll(task, rule, SecondOrder())
    unroll.run(unroll.start(batch), NUM_STEPS).meta_loss.backward()
    for name, parameter in rule.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_second_derivatives_matter():
    """First order and full gradient are two different things; otherwise the tests above would prove little."""
    torch.manual_seed(0)
    task, rule = DoubleQuadratic(4), CoordinatewiseLSTM(5, preprocessing="identity", output_scale=1.0).double()
    batch = data(task, 2)
    found = []
    for order in (FirstOrder, SecondOrder):
        rule.zero_grad()
        unroll = Unroll(task, rule, order())
        unroll.run(unroll.start(batch), NUM_STEPS).meta_loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in rule.parameters()]))
    assert (found[0] - found[1]).norm() > 0.01 * found[1].norm()


def test_the_meta_loss_sums_num_steps_terms_and_leaves_out_the_start(rule):
    class Counting(Task):
        """f_t = 10^t whatever theta is, so that the sum tells which terms are in it."""

        def init_params(self, num_tasks, generator):
            return {"theta": torch.zeros(num_tasks, 1, dtype=torch.float64)}

        def loss(self, params, batch, step):
            return 10.0**step + 0 * params["theta"].sum(1)

    unroll = Unroll(Counting(), rule)
    episode = unroll.start({"seed": torch.arange(2)})
    assert episode.losses.tolist() == [1, 1]
    assert unroll.run(episode, 3).meta_loss.item() == pytest.approx(1110)
    assert unroll.run(episode, 3).meta_loss.item() == pytest.approx(1110000)


def test_one_forward_and_one_backward_of_the_optimizee_a_step(rule):
    calls = []

    class Spy(DoubleQuadratic):
        def loss(self, params, batch, step):
            calls.append(step)
            return super().loss(params, batch, step)

    task = Spy(4)
    unroll = Unroll(task, rule)
    episode = unroll.start(data(task, 2))
    for _ in range(2):
        unroll.run(episode, UNROLL)
    assert calls == list(range(NUM_STEPS + 1))


def test_tasks_do_not_depend_on_their_neighbours(task, rule):
    batch = data(task, 3)
    unroll = Unroll(task, rule)
    together = unroll.run(unroll.start(batch), NUM_STEPS).losses
    for k in range(3):
        alone = unroll.run(unroll.start({name: v[k : k + 1] for name, v in batch.items()}), NUM_STEPS).losses
        torch.testing.assert_close(alone[:, 0], together[:, k], rtol=1e-9, atol=1e-12)


def test_buffers_hold_each_copys_statistics(rule):
    torch.manual_seed(0)
    task = NetworkTask(batch_norm_net())
    unroll = Unroll(task, rule)
    episode = unroll.start(data(task, 2))
    unroll.run(episode, NUM_STEPS)
    mean = episode.variables["1.running_mean"]
    assert mean.shape == (2, 4) and not torch.equal(mean[0], mean[1]) and (mean != 0).all()


class Wrong(Quadratic):
    def __init__(self, change):
        super().__init__(2)
        self.change = change

    def loss(self, params, batch, step):
        return self.change(super().loss(params, batch, step))


@pytest.mark.parametrize(
    "change, message", [(lambda x: x.mean(), "one loss per task"), (lambda x: x / 0, "not finite at the start")]
)
def test_a_broken_task_gets_one_clear_line(change, message):
    rule = CoordinatewiseLSTM()
    batch = {"W": torch.ones(3, 2, 2), "y": torch.zeros(3, 2), "seed": torch.arange(3)}
    with pytest.raises(ValueError, match=message):
        Unroll(Wrong(change), rule).start(batch)


@pytest.mark.parametrize("gamma", [None, 0.8])
@pytest.mark.parametrize("weights", [[1.0] * NUM_STEPS, [0.0] * NUM_STEPS], ids=["with", "without a meta-loss"])
def test_imitation_adds_the_gradient_of_its_loss(task, rule, weights, gamma):
    batch, strength = data(task, 2), 7.0
    meta_loss, _, _, _ = brute_force(task, rule, batch, NUM_STEPS, weights=weights)
    plain = Unroll(task, rule)
    episode = plain.start(batch)
    # The teacher is SGD with momentum: velocity v = 0.5 v + g, update -lr v, on the rule's own trajectory; its
    # learning rate may fall by a factor every step.
    missed, size = 0.0, 0.0
    fed = [(part, torch.zeros_like(part.theta), part.state.clone()) for part in episode.parts]
    for t in range(NUM_STEPS):
        lr = 0.3 * (gamma or 1) ** t
        for k, (part, velocity, state) in enumerate(fed):
            velocity = 0.5 * velocity + part.gradient
            update, state = part.rule(part.gradient.flatten(), state)
            missed = missed + (update + lr * velocity.flatten()).square().sum()
            size = size + (lr * velocity).square().sum()
            fed[k] = (part, velocity, state)
        plain.run(episode, 1)
    imitation_loss = NUM_STEPS * missed / size
    want = torch.autograd.grad(meta_loss + strength * imitation_loss, list(rule.parameters()), materialize_grads=True)

    def sgd(params):
        return torch.optim.SGD(params, lr=0.3, momentum=0.5)

    def falling(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)

    unroll = Unroll(task, rule, imitation=Imitation(strength, sgd, gamma and falling))
    result = unroll.run(unroll.start(batch), NUM_STEPS, weights)
    result.meta_loss.backward()
    torch.testing.assert_close(result.meta_loss, meta_loss.detach().to(result.meta_loss), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.imitation_loss, imitation_loss.detach(), rtol=1e-10, atol=1e-12)
    for parameter, gradient in zip(rule.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


def test_imitation_and_second_derivatives_do_not_go_together(rule):
    with pytest.raises(ValueError, match="imitation and meta_gradient=SecondOrder do not go together; leave one out"):
        Unroll(Quadratic(2), rule, SecondOrder(), Imitation(1.0))
