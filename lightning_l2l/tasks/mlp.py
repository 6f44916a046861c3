"""Multilayer perceptrons."""

from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


class MLP(nn.Module):
    """Fully connected network; the defaults are the MNIST optimizee of the reference, 784-20-10.

    Args:
        in_features: Size of an input after flattening, at least 1.
        hidden_size: Units of each hidden layer, at least 1.
        num_layers: Number of *hidden* layers, at least 0; with 0 the network is linear.
        out_features: Size of an output, at least 1.
        activation: Name of the hidden layers' activation, a key of ``ACTIVATIONS``.

    Raises:
        ValueError: If a size is too small or the activation is unknown.

    Example:
        >>> import torch
        >>> MLP()(torch.zeros(5, 1, 28, 28)).shape
        torch.Size([5, 10])

    References:
        Andrychowicz et al., *Learning to learn by gradient descent by gradient descent*, section 3.2, 2016,
        https://arxiv.org/abs/1606.04474
    """

    def __init__(
        self,
        in_features: int = 784,
        hidden_size: int = 20,
        num_layers: int = 1,
        out_features: int = 10,
        activation: str = "sigmoid",
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "hidden_size": hidden_size, "out_features": out_features}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if num_layers < 0:
            raise ValueError(f"num_layers={num_layers} must be at least 0 (it counts the hidden layers)")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
        self.in_features, self.out_features = in_features, out_features
        self.hidden_size, self.num_layers, self.activation = hidden_size, num_layers, activation
        layers: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for _ in range(num_layers):
            layers += [nn.Linear(width, hidden_size), ACTIVATIONS[activation]()]
            width = hidden_size
        self.layers = nn.Sequential(*layers, nn.Linear(width, out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[n, ...]`` to outputs ``[n, out_features]``."""
        outputs: Tensor = self.layers(inputs)
        return outputs
