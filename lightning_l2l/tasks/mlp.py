"""Multilayer perceptrons and the autoencoder made of one."""

from itertools import pairwise

from torch import Tensor, nn

from lightning_l2l.arguments import check_at_least, check_choice, check_fits_memory

_MOST_LAYERS = 1000

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
        ValueError: If a size is out of range or needs more memory than there is, or the activation is unknown.

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
        check_at_least(1, in_features=in_features, hidden_size=hidden_size, out_features=out_features)
        check_at_least(0, _MOST_LAYERS, num_layers=num_layers)
        check_choice(ACTIVATIONS, activation=activation)
        widths = [in_features, *[hidden_size] * num_layers, out_features]
        num_bytes = 4 * sum((a + 1) * b for a, b in pairwise(widths))
        layers = {"hidden_size": hidden_size, "num_layers": num_layers} if num_layers else {}
        check_fits_memory(num_bytes, in_features=in_features, **layers, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.hidden_size, self.num_layers, self.activation = hidden_size, num_layers, activation
        modules: list[nn.Module] = [nn.Flatten()]
        width = in_features
        for _ in range(num_layers):
            modules += [nn.Linear(width, hidden_size), ACTIVATIONS[activation]()]
            width = hidden_size
        self.layers = nn.Sequential(*modules, nn.Linear(width, out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[n, ...]`` to outputs ``[n, out_features]``."""
        outputs: Tensor = self.layers(inputs)
        return outputs


class Autoencoder(nn.Module):
    """Fully connected network that gives its input back through fewer units: by default 784-32-784, for MNIST.

    For a `NetworkTask` with ``reconstruct=True``, whose targets are the inputs, and
    ``loss_fn=torch.nn.functional.mse_loss``. The outputs are linear in the hidden units.

    Args:
        in_features: Size of an input after flattening, at least 1.
        hidden_size: Units of the hidden layer, at least 1.
        activation: Name of the hidden layer's activation, a key of ``ACTIVATIONS``.

    Raises:
        ValueError: If a size is out of range or needs more memory than there is, or the activation is unknown.

    Example:
        >>> import torch
        >>> Autoencoder()(torch.zeros(5, 28, 28)).shape
        torch.Size([5, 28, 28])

    References:
        Hinton, Salakhutdinov, *Reducing the dimensionality of data with neural networks*, 2006,
        https://doi.org/10.1126/science.1127647; as a task of learned optimizers: Metz et al., *Using a thousand
        optimization tasks to learn hyperparameter search strategies*, 2020, https://arxiv.org/abs/2002.11887
    """

    def __init__(self, in_features: int = 784, hidden_size: int = 32, activation: str = "sigmoid") -> None:
        super().__init__()
        check_at_least(1, in_features=in_features, hidden_size=hidden_size)
        check_choice(ACTIVATIONS, activation=activation)
        num_bytes = 4 * (2 * in_features * hidden_size + in_features + hidden_size)
        check_fits_memory(num_bytes, in_features=in_features, hidden_size=hidden_size)
        self.in_features, self.hidden_size, self.activation = in_features, hidden_size, activation
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(in_features, hidden_size), ACTIVATIONS[activation]())
        self.decoder = nn.Linear(hidden_size, in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[n, ...]`` to outputs of the same shape."""
        outputs: Tensor = self.decoder(self.encoder(inputs))
        return outputs.view(inputs.shape)
