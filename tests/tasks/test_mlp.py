import pytest
import torch
from torch import nn

from lightning_l2l.tasks import MLP, Autoencoder
from lightning_l2l.tasks.mlp import ACTIVATIONS


def test_default_is_the_784_20_10_network():
    net = MLP()
    assert sum(parameter.numel() for parameter in net.parameters()) == 15_910
    first, second = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
    x = torch.rand(3, 28, 28)
    expected = torch.sigmoid(x.flatten(1) @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_layers_and_activations(activation, num_layers):
    net = MLP(6, 5, num_layers, 2, activation)
    assert net(torch.rand(4, 2, 3)).shape == (4, 2)
    assert sum(isinstance(layer, ACTIVATIONS[activation]) for layer in net.modules()) == num_layers
    assert sum(isinstance(layer, nn.Linear) for layer in net.modules()) == num_layers + 1


def test_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'cubed' is unknown; use one of elu, .*tanh"):
        MLP(activation="cubed")


@pytest.mark.parametrize("kwargs", [{"in_features": 0}, {"hidden_size": -1}, {"num_layers": -1}, {"out_features": 0}])
def test_sizes_are_checked(kwargs):
    ((name, value),) = kwargs.items()
    with pytest.raises(ValueError, match=f"{name}={value} is not an integer of"):
        MLP(**kwargs)


def test_an_autoencoder_is_784_32_784_and_gives_the_shape_of_its_inputs():
    net = Autoencoder()
    assert sum(parameter.numel() for parameter in net.parameters()) == 784 * 32 + 32 + 32 * 784 + 784
    x = torch.rand(3, 28, 28)
    first, second = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
    hidden = torch.sigmoid(x.flatten(1) @ first.weight.T + first.bias)
    torch.testing.assert_close(net(x), (hidden @ second.weight.T + second.bias).view(3, 28, 28))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_an_autoencoder(activation):
    net = Autoencoder(6, 4, activation)
    assert net(torch.rand(5, 2, 3)).shape == (5, 2, 3)
    assert sum(isinstance(layer, ACTIVATIONS[activation]) for layer in net.modules()) == 1


@pytest.mark.parametrize("kwargs", [{"in_features": 0}, {"hidden_size": True}, {"activation": "cubed"}])
def test_arguments_of_an_autoencoder_are_checked(kwargs):
    ((name, value),) = kwargs.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Autoencoder(**kwargs)
