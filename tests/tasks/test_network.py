import copy
import math

import jsonargparse
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_l2l.data import MNISTDataModule
from lightning_l2l.tasks import MLP, Autoencoder, NetworkTask, Task, init_from_seeds


def make_batch(num_tasks, shape, num_classes=3, num_steps=3, rows=6):
    g = torch.Generator().manual_seed(1)
    return {
        "inputs": torch.randint(256, (num_tasks, num_steps, rows, *shape), generator=g).to(torch.uint8),
        "targets": torch.randint(num_classes, (num_tasks, num_steps, rows), generator=g).to(torch.uint8),
        "seed": torch.arange(num_tasks) + 5,
    }


def reference(module, params, buffers, batch, steps, loss_fn=F.cross_entropy):
    """One ordinary module per task, run by ordinary autograd."""
    nets, losses = [], []
    for k in range(len(next(iter(params.values())))):
        net = copy.deepcopy(module).train()
        net.load_state_dict({name: t[k] for name, t in (params | buffers).items()}, strict=False)
        dtype = next(net.parameters()).dtype
        per_step = []
        for step in steps:
            inputs = batch["inputs"][k, step]
            inputs = inputs.to(dtype) / 255 if inputs.dtype == torch.uint8 else inputs
            per_step.append(loss_fn(net(inputs), batch["targets"][k, step].long()))
        losses.append(torch.stack(per_step))
        nets.append(net)
    return nets, torch.stack(losses, 1)  # [steps, num_tasks]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Counter(nn.Module):
    """Replaces a buffer where batch norm would write into it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        out = self.head(x)
        self.mean = 0.5 * self.mean + 0.5 * out.mean(0)
        return out


CONVNET = nn.Sequential(
    nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    nn.BatchNorm1d(3, momentum=0.3),
)  # fmt: skip
MODULES = {
    "mlp": (MLP(4, 5, 2, 3), (4,)),
    "batch-norm": (CONVNET, (2, 6, 6)),
    "group-norm": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)),
        (2, 6, 6),
    ),
    "cumulative-batch-norm": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)), (4,)),
    "tied": (Tied(), (4,)),
    "lstm": (Recurrent(), (5, 4)),
    "replaced-buffer": (Counter(), (4,)),
}


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_same_as_a_loop_over_ordinary_modules(name, num_tasks, label_dtype):
    module, shape = MODULES[name]
    module = copy.deepcopy(module).double()
    task = NetworkTask(module)
    batch = make_batch(num_tasks, shape)
    batch["targets"] = batch["targets"].to(label_dtype)
    params, buffers = init_from_seeds(task, torch.arange(num_tasks))
    assert {tensor.dtype for tensor in params.values()} == {torch.float64}
    nets, expected = reference(module, params, buffers, batch, range(3))

    for tensor in params.values():
        tensor.requires_grad_()
    losses = torch.stack([task.loss(params | buffers, batch, step) for step in range(3)])
    torch.testing.assert_close(losses, expected)
    gradients = torch.autograd.grad(losses.sum(), list(params.values()))
    expected.sum().backward()
    for k, net in enumerate(nets):
        named = dict(net.named_parameters())
        for key, gradient in zip(params, gradients, strict=True):
            torch.testing.assert_close(gradient[k], named[key].grad)
        for key, buffer in net.named_buffers():
            torch.testing.assert_close(buffers[key][k], buffer)
            assert not buffers[key].requires_grad


def unseen_by_hand(module, params, buffers, batch, loss_fn=F.cross_entropy):
    """Loss and accuracy of one ordinary module per task, in evaluation mode."""
    losses, accuracies = [], []
    for k, inputs in enumerate(batch["unseen_inputs"]):
        net = copy.deepcopy(module)
        net.load_state_dict({name: tensor[k] for name, tensor in (params | buffers).items()}, strict=False)
        net.eval()
        dtype = next(net.parameters()).dtype
        with torch.no_grad():
            outputs = net(inputs.to(dtype) / 255 if inputs.dtype == torch.uint8 else inputs)
        targets = batch["unseen_targets"][k].long()
        losses.append(loss_fn(outputs, targets))
        accuracies.append((outputs.argmax(1) == targets).to(dtype).mean())
    return {"loss": torch.stack(losses), "accuracy": torch.stack(accuracies)}


def with_unseen(batch, shape, num_classes=3, rows=9):
    g = torch.Generator().manual_seed(2)
    num_tasks = len(batch["seed"])
    return batch | {
        "unseen_inputs": torch.randint(256, (num_tasks, rows, *shape), generator=g).to(torch.uint8),
        "unseen_targets": torch.randint(num_classes, (num_tasks, rows), generator=g).to(torch.uint8),
    }


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_unseen_same_as_ordinary_modules_in_evaluation_mode(name, num_tasks, label_dtype):
    module, shape = MODULES[name]
    module = copy.deepcopy(module).double()
    task = NetworkTask(module)
    batch = with_unseen(make_batch(num_tasks, shape), shape)
    batch["unseen_targets"] = batch["unseen_targets"].to(label_dtype)
    params, buffers = init_from_seeds(task, torch.arange(num_tasks))
    for step in range(3):  # running statistics, other ones for each copy
        task.loss(params | buffers, batch, step)
    before = {key: tensor.clone() for key, tensor in (params | buffers).items()}
    figures = task.unseen(params | buffers, batch)
    torch.testing.assert_close(figures, unseen_by_hand(module, params, buffers, batch))
    assert all(torch.equal(tensor, before[key]) for key, tensor in (params | buffers).items())
    # without the buffers: the initial ones
    initial = {key: tensor.double() for key, tensor in task.init_buffers(num_tasks).items()}
    torch.testing.assert_close(task.unseen(params, batch), unseen_by_hand(module, params, initial, batch))


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_unseen_without_dropout(num_tasks):
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), FunctionalDropout(8, 3))
    task = NetworkTask(module)
    batch = with_unseen(make_batch(num_tasks, (4,)), (4,))
    params, _ = init_from_seeds(task, torch.arange(num_tasks))
    before = task.loss(params, batch, 0)
    torch.testing.assert_close(task.unseen(params, batch), unseen_by_hand(module, params, {}, batch))
    assert torch.equal(task.loss(params, batch, 0), before)
    assert all(layer.training for layer in task._template.modules())


def test_unseen_in_layers_with_kernels_of_their_own_for_evaluation():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 3))
    batch = with_unseen(make_batch(2, (5, 4)), (5, 4))
    task = NetworkTask(lambda: copy.deepcopy(module))
    params, _ = init_from_seeds(task, torch.arange(2))
    torch.testing.assert_close(task.unseen(params, batch), unseen_by_hand(module, params, {}, batch))


def test_unseen_uses_the_loss_function():
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.3)
    task = NetworkTask(MLP(4, 5, 1, 3), loss_fn=loss_fn)
    batch = with_unseen(make_batch(2, (4,)), (4,))
    params, _ = init_from_seeds(task, torch.arange(2))
    expected = unseen_by_hand(task.module, params, {}, batch, loss_fn)
    torch.testing.assert_close(task.unseen(params, batch), expected)


def squeezed_mse(output, target):
    return F.mse_loss(output.squeeze(1), target.to(output.dtype))


@pytest.mark.parametrize(
    ("out_features", "targets", "loss_fn"),
    [
        (2, torch.randn(3, 5, 2), F.mse_loss),  # not labels
        (1, torch.arange(15).view(3, 5), squeezed_mse),  # integers, but no classes to choose from
    ],
)
def test_unseen_has_no_accuracy_without_classes(out_features, targets, loss_fn):
    module = nn.Linear(4, out_features)
    task = NetworkTask(module, loss_fn=loss_fn)
    batch = {"unseen_inputs": torch.randn(3, 5, 4), "unseen_targets": targets}
    params, _ = init_from_seeds(task, torch.arange(3))
    figures = task.unseen(params, batch)
    assert set(figures) == {"loss"}
    for k in range(3):
        outputs = F.linear(batch["unseen_inputs"][k], params["weight"][k], params["bias"][k])
        torch.testing.assert_close(figures["loss"][k], loss_fn(outputs, targets[k]))


def test_accuracy_is_the_share_of_hits():
    task = NetworkTask(nn.Linear(3, 3, bias=False))
    params = {"weight": torch.eye(3).expand(2, 3, 3)}
    batch = {
        "unseen_inputs": torch.eye(3)[[0, 1, 2, 0]].expand(2, 4, 3),
        "unseen_targets": torch.tensor([[0, 1, 2, 0], [0, 0, 0, 1]], dtype=torch.uint8),
    }
    assert task.unseen(params, batch)["accuracy"].tolist() == [1.0, 0.25]


@pytest.mark.parametrize("shape", [(4,), (4, 5, 6)])
def test_accuracy_where_an_output_has_places(shape):
    """Classes are the second dimension, as `cross_entropy` has them, and every place counts."""
    task = NetworkTask(MLP(3, 2, 1, 3) if len(shape) == 1 else nn.Conv2d(3, 3, 1))
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 3, *shape[1:], generator=g)
    batch = {"unseen_inputs": inputs, "unseen_targets": torch.randint(3, (2, *shape), generator=g).byte()}
    params, _ = init_from_seeds(task, torch.arange(2))
    found = task.unseen(params, batch)["accuracy"]
    for k in range(2):
        module = copy.deepcopy(task.module)
        module.load_state_dict({name: value[k] for name, value in params.items()})
        hits = (module(inputs[k]).argmax(1) == batch["unseen_targets"][k]).float()
        assert hits.shape == shape
        torch.testing.assert_close(found[k], hits.mean())


def reconstruction(module=None):
    return NetworkTask(module or Autoencoder(6, 4), loss_fn=F.mse_loss, reconstruct=True)


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("with_targets", [True, False])
def test_targets_may_be_the_inputs(num_tasks, with_targets):
    task, batch = reconstruction(), with_unseen(make_batch(num_tasks, (2, 3)), (2, 3))
    if not with_targets:
        batch = {name: value for name, value in batch.items() if "targets" not in name}
    params, _ = init_from_seeds(task, torch.arange(num_tasks))
    unseen = task.unseen(params, batch)
    assert unseen.keys() == {"loss"}
    for k in range(num_tasks):
        module = copy.deepcopy(task.module)
        module.load_state_dict({name: value[k] for name, value in params.items()})
        pixels = batch["inputs"][k, 1].float() / 255
        torch.testing.assert_close(task.loss(params, batch, 1)[k], (module(pixels) - pixels).square().mean())
        pixels = batch["unseen_inputs"][k]
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        torch.testing.assert_close(unseen["loss"][k], (module(pixels) - pixels).square().mean())


def test_copies_of_an_autoencoder_run_side_by_side_and_learn_the_digits(mnist_root):
    data = MNISTDataModule(mnist_root, num_tasks=2, batch_size=32, num_steps=60, download=False)
    data.setup()
    batch, calls = next(iter(data.val_dataloader())), []
    task = reconstruction(Autoencoder(hidden_size=8))
    task._template.register_forward_pre_hook(lambda *_: calls.append(1))
    params = {name: value.requires_grad_() for name, value in init_from_seeds(task, batch["seed"])[0].items()}
    optimizer, first = torch.optim.Adam(params.values(), lr=0.01), task.unseen(params, batch)["loss"]
    calls.clear()
    for step in range(60):
        optimizer.zero_grad()
        task.loss(params, batch, step).sum().backward()
        optimizer.step()
    assert len(calls) == 60
    assert (task.unseen(params, batch)["loss"] < 0.6 * first).all()


def test_data_that_cannot_be_reconstructed():
    task, batch = reconstruction(), make_batch(2, (2, 3))
    params, _ = init_from_seeds(task, torch.arange(2))
    with pytest.raises(ValueError, match="the batch has 3 minibatches and the episode wants more"):
        task.loss(params, batch, 3)
    with pytest.raises(ValueError, match="the batch has no 'inputs'"):
        task.loss(params, {"targets": batch["targets"]}, 0)
    with pytest.raises(ValueError, match="Autoencoder and its loss do not take inputs"):
        task.loss(params, make_batch(2, (7,)), 0)
    with pytest.raises(ValueError, match="reconstruct='yes' is neither True nor False"):
        NetworkTask(Autoencoder(), reconstruct="yes")
    with pytest.raises(ValueError, match="of which cross_entropy is no loss; give loss_fn=torch"):
        NetworkTask(Autoencoder(), reconstruct=True)


def test_no_unseen_data_no_figures():
    task = NetworkTask(MLP(4, 5, 1, 3))
    assert task.unseen(init_from_seeds(task, torch.arange(2))[0], make_batch(2, (4,))) == {}


def test_a_failing_forward_on_unseen_data_leaves_the_task_in_training_mode():
    task = NetworkTask(copy.deepcopy(CONVNET))
    params, buffers = init_from_seeds(task, torch.arange(2))
    with pytest.raises(ValueError, match="do not take inputs"):
        task.unseen(params | buffers, with_unseen(make_batch(2, (1, 6, 6)), (1, 6, 6)))
    assert all(layer.training for layer in task._template.modules())


def test_ignored_labels_do_not_count():
    task = NetworkTask(MLP(4, 5, 1, 3))
    batch = make_batch(2, (4,))
    batch["targets"] = batch["targets"].long()
    batch["targets"][0, 0, :4] = -100
    params, _ = init_from_seeds(task, torch.arange(2))
    _, expected = reference(task.module, params, {}, batch, [0])
    torch.testing.assert_close(task.loss(params, batch, 0), expected[0].detach())


def test_any_loss_and_floating_point_targets():
    task = NetworkTask(nn.Linear(4, 2).double(), loss_fn=nn.MSELoss())
    batch = {"inputs": torch.randn(3, 1, 5, 4), "targets": torch.randn(3, 1, 5, 2)}
    params, _ = init_from_seeds(task, torch.arange(3))
    out = torch.einsum("bni,boi->bno", batch["inputs"][:, 0].double(), params["weight"]) + params["bias"].unsqueeze(1)
    torch.testing.assert_close(task.loss(params, batch, 0), (out - batch["targets"][:, 0]).square().mean((1, 2)))


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_dropout_masks_differ_between_copies_and_steps_and_repeat(num_tasks):
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1, bias=False))
    task = NetworkTask(module, loss_fn=lambda output, target: output.mean(), init_scale=1.0)
    batch = {
        "inputs": torch.ones(num_tasks, 2, 1, 64),
        "targets": torch.zeros(num_tasks, 2, 1),
        "seed": torch.arange(num_tasks),
    }
    weight = torch.ones(num_tasks, 1, 64, requires_grad=True)

    def masks(step, offset=0):
        losses = task.loss({"1.weight": weight}, batch | {"seed": batch["seed"] + offset}, step)
        return torch.autograd.grad(losses.sum(), weight)[0].squeeze(1)  # [num_tasks, 64], 0 or 2

    first = masks(0)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert torch.unique(first, dim=0).shape[0] == num_tasks
    torch.rand(3)  # the global generator has no say
    assert torch.equal(first, masks(0))
    assert not torch.equal(first, masks(1)) and not torch.equal(first, masks(0, offset=1))


def test_dropout_needs_a_seed():
    task = NetworkTask(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)))
    batch = make_batch(2, (4,))
    del batch["seed"]
    with pytest.raises(ValueError, match="no 'seed'"):
        task.loss(init_from_seeds(task, torch.arange(2))[0], batch, 0)


class FunctionalDropout(nn.Linear):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


def test_functional_randomness_is_refused_until_declared():
    batch = make_batch(2, (4,))
    task = NetworkTask(FunctionalDropout(4, 3))
    params, _ = init_from_seeds(task, torch.arange(2))
    with pytest.raises(RuntimeError, match="randomness"):
        task.loss(params, batch, 0)
    task = NetworkTask(FunctionalDropout(4, 3), stochastic=True)
    assert torch.equal(task.loss(params, batch, 0), task.loss(params, batch, 0))


@pytest.mark.parametrize("build", [lambda: MLP(4, 5, 2, 3), Recurrent, lambda: nn.MultiheadAttention(4, 2)])
@pytest.mark.parametrize("as_callable", [True, False])
def test_a_start_is_what_the_constructor_gives_under_the_seed(build, as_callable):
    task = NetworkTask(build if as_callable else build())
    params = task.init_params(1, torch.Generator().manual_seed(9))
    with torch.random.fork_rng():
        torch.manual_seed(9)
        expected = dict(build().named_parameters())
    assert params.keys() == expected.keys()
    assert all(torch.equal(params[name][0], expected[name]) for name in params)


def test_own_initialisers_keep_their_bounds():
    params, _ = init_from_seeds(NetworkTask(nn.Linear(16, 8)), torch.arange(50))
    bound = 1 / math.sqrt(16)
    for tensor in params.values():
        assert tensor.abs().max() <= bound
        assert abs(tensor.std().item() / (bound / math.sqrt(3)) - 1) < 0.1


def test_init_scale_is_the_standard_deviation_of_every_parameter():
    params, _ = init_from_seeds(NetworkTask(nn.BatchNorm1d(40), init_scale=0.2), torch.arange(50))
    for tensor in params.values():
        assert abs(tensor.mean().item()) < 0.02 and abs(tensor.std().item() / 0.2 - 1) < 0.1


def test_buffers_start_fresh_with_own_initialisers():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    module(torch.randn(5, 4))
    buffers = NetworkTask(module).init_buffers(2)
    assert torch.equal(buffers["1.running_mean"], torch.zeros(2, 3))
    assert torch.equal(buffers["1.num_batches_tracked"], torch.zeros(2, dtype=torch.int64))
    assert module[1].num_batches_tracked == 1


def test_frozen_parameters_keep_their_values_and_are_not_trained():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    module(torch.randn(5, 4))
    module[:2].requires_grad_(False)
    task = NetworkTask(module)
    params, buffers = init_from_seeds(task, torch.arange(2))
    assert set(params) == {"2.weight", "2.bias"}
    assert torch.equal(buffers["0.weight"][1], module[0].weight)
    assert torch.equal(buffers["1.running_mean"][1], module[1].running_mean)
    batch = make_batch(2, (4,))
    _, expected = reference(module, params, buffers, batch, [0])
    torch.testing.assert_close(task.loss(params, batch, 0), expected[0].detach())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.scale * self.head(x)


def test_parameters_that_cannot_be_initialised_anew():
    with pytest.raises(ValueError, match=r"'0.scale' of Scaled .*init_scale=.*callable"):
        NetworkTask(nn.Sequential(Scaled()))
    for task in (NetworkTask(nn.Sequential(Scaled()), init_scale=0.1), NetworkTask(Scaled)):
        params, _ = init_from_seeds(task, torch.arange(2))
        assert task.loss(params, make_batch(2, (4,)), 0).isfinite().all()


@pytest.mark.parametrize("init_scale", [0, -1.0, math.inf, math.nan])
def test_init_scale_must_be_positive(init_scale):
    with pytest.raises(ValueError, match=r"init_scale=.* must be positive"):
        NetworkTask(MLP(), init_scale=init_scale)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.ReLU(), "no parameters to train"),
        (nn.Linear(2, 2).requires_grad_(False), "no parameters to train"),
        (nn.LazyLinear(2), "uninitialised"),
    ],
)
def test_modules_that_cannot_be_trained(module, message):
    with pytest.raises(ValueError, match=message):
        NetworkTask(module)


def test_module_in_evaluation_mode_is_left_so_and_trained_all_the_same():
    module = copy.deepcopy(CONVNET).eval()
    task = NetworkTask(module)
    params, buffers = init_from_seeds(task, torch.arange(2))
    task.loss(params | buffers, make_batch(2, (2, 6, 6)), 0)
    assert not module.training and (buffers["1.num_batches_tracked"] == 1).all()


def test_a_failing_forward_leaves_the_task_usable():
    task = NetworkTask(MLP(4, 5, 1, 3))
    params, _ = init_from_seeds(task, torch.arange(2))
    batch = make_batch(2, (4,))
    expected = task.loss(params, batch, 0)
    with pytest.raises(ValueError, match="do not take inputs"):
        task.loss(params, make_batch(2, (7,)), 0)
    assert torch.equal(task.loss(params, batch, 0), expected)
    with pytest.raises(ValueError, match="the batch has 3 minibatches"):
        task.loss(params, batch, 3)


MLP_CONFIG = {"class_path": "lightning_l2l.tasks.MLP", "init_args": {"in_features": 4, "out_features": 3}}
SMOOTHED = {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}}


@pytest.mark.parametrize("loss_fn", ["torch.nn.functional.cross_entropy", SMOOTHED, "torch.nn.NLLLoss"])
def test_command_line_types(loss_fn):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Task, "task")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in 4.49
    init_args = {"module": MLP_CONFIG, "loss_fn": loss_fn, "init_scale": 0.5}
    config = parser.parse_object({"task": {"class_path": "lightning_l2l.tasks.NetworkTask", "init_args": init_args}})
    task = instantiate(config).task
    assert isinstance(task, NetworkTask) and isinstance(task.module, MLP) and task.init_scale == 0.5
    if loss_fn is SMOOTHED:
        assert task.loss_fn.label_smoothing == 0.1
    else:
        assert task.loss_fn is F.cross_entropy or isinstance(task.loss_fn, nn.NLLLoss)
    assert task.loss(task.init_params(2, torch.Generator()), make_batch(2, (4,)), 0).shape == (2,)


def test_arguments_are_kept_under_their_names():
    module, loss_fn = MLP(4, 5, 1, 3), nn.CrossEntropyLoss()
    task = NetworkTask(module, loss_fn, 0.5, stochastic=False)
    assert task.module is module and task.loss_fn is loss_fn
    assert task.init_scale == 0.5 and task.stochastic is False
