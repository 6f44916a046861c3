import pytest
import torch
from torch import nn

from lightning_l2l.tasks import ConvNet, NetworkTask, init_from_seeds
from lightning_l2l.tasks.mlp import ACTIVATIONS

NOT_MONOTONE = ("gelu", "silu")


def test_default_is_three_convolutions_and_a_layer_of_32_with_batch_norm():
    net = ConvNet()
    convs = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(3, 16), (16, 16), (16, 16)]
    assert [layer.out_features for layer in net.modules() if isinstance(layer, nn.Linear)] == [32, 10]
    assert sum(isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d) for layer in net.modules()) == 4
    assert {name.partition(".")[0] for name, _ in net.named_parameters()} == {"conv", "fc"}


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_convs, image_size", [(1, 2), (2, 7), (3, 8)])
def test_it_is_conv_norm_pooling_and_activation_again_and_again(num_convs, image_size, activation, batch_norm):
    torch.manual_seed(0)
    net = ConvNet(image_size, 2, 4, num_convs, 5, 3, activation, batch_norm)
    x = images = torch.randn(6, 2, image_size, image_size)
    act = ACTIVATIONS[activation]()
    step = 4 if batch_norm else 3
    for k in range(num_convs):
        x = net.conv[step * k](x)
        if batch_norm:
            x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        if activation not in NOT_MONOTONE:  # with the others, to pool first gives the same
            x = act(x)
        side = x.shape[-1] // 2
        x = x[..., : 2 * side, : 2 * side].unflatten(3, (side, 2)).unflatten(2, (side, 2)).amax((3, 5))
        if activation in NOT_MONOTONE:
            x = act(x)
    x = net.fc[1](x.flatten(1))
    if batch_norm:
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(net(images), net.fc[-1](act(x)), rtol=1e-4, atol=1e-4)


def test_several_copies_run_side_by_side_as_they_do_alone():
    task = NetworkTask(ConvNet(8, 3, 4, 2, 5))
    params, buffers = init_from_seeds(task, torch.arange(3))
    batch = {"inputs": torch.rand(3, 2, 6, 3, 8, 8), "targets": torch.randint(10, (3, 2, 6)).to(torch.uint8)}
    together = task.loss({**params, **buffers}, batch, 1)
    for k in range(3):
        part, own = ({n: v[k : k + 1] for n, v in values.items()} for values in (batch, params))
        torch.testing.assert_close(task.loss(own, part, 1), together[k : k + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"channels": 0}, "channels=0"),
        ({"num_convs": 9}, "num_convs=9 is too large"),
        ({"image_size": 7}, "image_size=7 is not an integer of 8 or more"),
        ({"activation": "cubed"}, "activation='cubed' is unknown"),
        ({"batch_norm": 1}, "batch_norm=1"),
        ({"channels": 10**7}, "channels=10000000"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(**arguments)


def test_images_of_one_channel_may_come_without_it():
    net, images = ConvNet(8, 1, 2, 1, 3, batch_norm=False), torch.rand(5, 8, 8)
    assert torch.equal(net(images), net(images[:, None]))
