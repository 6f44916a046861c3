import copy
import io

import pytest
import torch
from torch import nn

from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, Quadratic, load_rule
from lightning_l2l.comparison import rollout
from lightning_l2l.rule_files import save_rule, shipped_rules
from lightning_l2l.tasks import MLP, NetworkTask
from lightning_l2l.unroll import Unroll


@pytest.fixture
def rule():
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=4)


def model_and_loss(dtype=torch.float32):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    x = torch.randn(7, 3, dtype=dtype)
    return model, lambda: model(x).square().mean()


def train(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def network_batch(num_tasks):
    g = torch.Generator().manual_seed(2)
    inputs = torch.randn(num_tasks, 11, 8, 5, generator=g)
    targets = torch.randint(0, 3, (num_tasks, 11, 8), generator=g, dtype=torch.uint8)
    return {"inputs": inputs, "targets": targets, "seed": torch.arange(num_tasks)}


def quadratic_batch(num_tasks):
    g = torch.Generator().manual_seed(2)
    W, y = torch.randn(num_tasks, 4, 4, generator=g), torch.randn(num_tasks, 4, generator=g)
    return {"W": W, "y": y, "seed": torch.arange(num_tasks)}


@pytest.mark.parametrize("memory", ["fast", "flat"])
@pytest.mark.parametrize("which", ["quadratic", "network", "batch-norm"])
def test_the_trajectory_is_that_of_meta_training(rule, which, memory):
    if which == "quadratic":
        task, batch = Quadratic(4), quadratic_batch(3)
    elif which == "network":
        task, batch = NetworkTask(MLP(5, 4, out_features=3)), network_batch(3)
    else:
        net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
        task, batch = NetworkTask(net), network_batch(2)
    unroll = Unroll(task, rule, memory=memory)
    episode = unroll.start(batch)
    trained = torch.cat([unroll.run(episode, 5).losses for _ in range(2)])
    deployed = rollout(lambda p: LearnedOptimizer(p, rule), task, batch, 10, torch.device("cpu"))
    torch.testing.assert_close(deployed.losses[1:], trained, rtol=1e-5, atol=1e-7)


def test_updates_are_the_rules_own(rule):
    model, loss = model_and_loss()
    want = [p.detach().clone() for p in model.parameters()]
    states = [rule.init_state(p.numel()) for p in want]
    optimizer = LearnedOptimizer(model.parameters(), rule)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                update, states[k] = rule(p.grad.flatten(), states[k])
                want[k] += update.view_as(p)
        optimizer.step()
    for p, w in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.detach(), w)


def test_lr_multiplies_the_update(rule):
    moved = []
    for lr in (1.0, 0.5, 0.0):
        model, loss = model_and_loss()
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        train(LearnedOptimizer(model.parameters(), rule, lr=lr), loss, 1)
        moved.append(nn.utils.parameters_to_vector(model.parameters()).detach() - before)
    torch.testing.assert_close(moved[1], 0.5 * moved[0], rtol=1e-3, atol=1e-7)
    assert moved[0].abs().max() > 0 and (moved[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_and_loaded_in_the_middle_it_goes_on_exactly(rule, dtype):
    model, loss = model_and_loss(dtype)
    train(LearnedOptimizer(model.parameters(), rule), loss, 6)
    straight = nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    model, loss = model_and_loss(dtype)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    train(optimizer, loss, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model, loss = model_and_loss(dtype)
    model.load_state_dict(weights)
    optimizer = LearnedOptimizer(model.parameters(), rule)
    optimizer.load_state_dict(state)
    assert all(s["rule_state"].dtype == torch.float32 for s in optimizer.state.values())
    train(optimizer, loss, 3)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), straight)


def test_closure_groups_schedulers_and_missing_gradients(rule):
    model, loss = model_and_loss()
    first, last = model[0].parameters(), model[2].parameters()
    optimizer = LearnedOptimizer([{"params": first, "lr": 0.0}, {"params": last}], rule)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    frozen, moving = model[0].weight.detach().clone(), model[2].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        model[2].bias.grad = None
        return value

    bias = model[2].bias.detach().clone()
    assert optimizer.step(closure).item() > 0
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.0, 0.5]
    assert torch.equal(model[0].weight, frozen) and not torch.equal(model[2].weight, moving)
    assert torch.equal(model[2].bias, bias)


def test_a_copy_goes_its_own_way(rule):
    model, loss = model_and_loss()
    optimizer = LearnedOptimizer(model.parameters(), rule)
    train(optimizer, loss, 1)
    twin = copy.deepcopy(optimizer)
    before = [s["rule_state"].clone() for s in twin.state.values()]
    train(optimizer, loss, 1)
    assert all(torch.equal(a, s["rule_state"]) for a, s in zip(before, twin.state.values(), strict=True))


def test_sparse_gradients_and_negative_lr_are_refused(rule):
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        LearnedOptimizer(embedding.parameters(), rule).step()
    with pytest.raises(ValueError, match="lr=-1"):
        LearnedOptimizer(embedding.parameters(), rule, lr=-1)


def checkpoint(rule, tmp_path, change=lambda c: c):
    from lightning_l2l.rules.describe import describe

    content = {
        "state_dict": {f"rule.{k}": v for k, v in rule.state_dict().items()},
        "hyper_parameters": {"rule": describe(rule)},
    }
    torch.save(change(content), tmp_path / "rule.ckpt")
    return tmp_path / "rule.ckpt"


def test_load_rule_brings_back_rule_and_weights(rule, tmp_path):
    loaded = load_rule(checkpoint(rule, tmp_path))
    assert isinstance(loaded, CoordinatewiseLSTM) and loaded.hidden_size == 4
    for a, b in zip(loaded.state_dict().values(), rule.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_load_rule_reads_rule_files_and_knows_the_shipped_ones(rule, tmp_path):
    save_rule(rule, tmp_path / "own.npz")
    assert torch.equal(load_rule(tmp_path / "own.npz").readout.weight, rule.readout.weight)
    for name in shipped_rules():
        assert not load_rule(name).training
    with pytest.raises(FileNotFoundError, match=r"no rule at 'cifar'; .* name of a shipped rule: mnist, quadratic"):
        load_rule("cifar")


def without_rule(content):
    del content["hyper_parameters"]["rule"]
    return content


def other_size(content):
    content["hyper_parameters"]["rule"]["init_args"]["hidden_size"] = 5
    return content


def unknown_class(content):
    content["hyper_parameters"]["rule"]["class_path"] = "os.system"
    return content


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint executed code",))


@pytest.mark.parametrize(
    "change, message",
    [
        (without_rule, "holds no rule"),
        (other_size, "do not fit"),
        (unknown_class, "'os.system' is not known"),
        (lambda c: {**c, "trap": Trap()}, "cannot be read"),
        (lambda c: [1, 2], "holds no rule"),
    ],
)
def test_load_rule_refuses(rule, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_rule(checkpoint(rule, tmp_path, change))


def test_load_rule_refuses_missing_and_truncated_files(rule, tmp_path):
    with pytest.raises(FileNotFoundError, match="no rule at"):
        load_rule(tmp_path / "nothing.ckpt")
    path = checkpoint(rule, tmp_path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read"):
            load_rule(path)
