"""Small convolutional networks."""

from torch import Tensor, nn

from lightning_l2l.arguments import check_at_least, check_choice, check_fits_memory, check_flag
from lightning_l2l.tasks.mlp import ACTIVATIONS

_MOST_CONVS = 8


class ConvNet(nn.Module):
    """Convolutions with max-pooling and one hidden layer; the defaults are the CIFAR-10 optimizee of the paper.

    A convolution of 3 x 3, batch norm, max-pooling by 2 and the activation, ``num_convs`` times (pooled first, there
    is a quarter to do for the activation, and all that are monotone give the same either way); then a fully connected
    layer of ``hidden_size`` units with batch norm and the activation, and the outputs. The names of the
    convolutional part's parameters begin with ``conv``, those of the other part with ``fc``. (How many channels the
    paper's network has is not said there.)

    Args:
        image_size: Height and width of an image in pixels, at least 2 to the power of ``num_convs``.
        in_channels: Channels of an image, at least 1.
        channels: Channels of each convolution, at least 1.
        num_convs: Convolutions, from 1 to 8.
        hidden_size: Units of the fully connected layer, at least 1.
        out_features: Size of an output, at least 1.
        activation: Name of the activation, a key of ``ACTIVATIONS``.
        batch_norm: Whether to normalise by the minibatch.

    Raises:
        ValueError: If a size is out of range or needs more memory than there is, or the activation is unknown.

    Example:
        >>> import torch
        >>> ConvNet()(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 10])

    References:
        Andrychowicz et al., *Learning to learn by gradient descent by gradient descent*, section 3.3, 2016,
        https://arxiv.org/abs/1606.04474
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        channels: int = 16,
        num_convs: int = 3,
        hidden_size: int = 32,
        out_features: int = 10,
        activation: str = "relu",
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        check_at_least(1, in_channels=in_channels, channels=channels, hidden_size=hidden_size)
        check_at_least(1, out_features=out_features)
        check_at_least(1, _MOST_CONVS, num_convs=num_convs)
        check_at_least(2**num_convs, image_size=image_size)
        check_choice(ACTIVATIONS, activation=activation)
        check_flag(batch_norm=batch_norm)
        side = image_size // 2**num_convs
        flat = channels * side * side
        num_bytes = 4 * (9 * channels * (in_channels + (num_convs - 1) * channels) + flat * hidden_size)
        num_bytes += 4 * hidden_size * out_features
        check_fits_memory(num_bytes, image_size=image_size, channels=channels, hidden_size=hidden_size)
        self.image_size, self.in_channels, self.channels, self.num_convs = image_size, in_channels, channels, num_convs
        self.hidden_size, self.out_features = hidden_size, out_features
        self.activation, self.batch_norm = activation, batch_norm
        convs: list[nn.Module] = []
        for k in range(num_convs):
            # A bias would be taken out again by the batch norm's mean.
            convs.append(nn.Conv2d(channels if k else in_channels, channels, 3, padding=1, bias=not batch_norm))
            convs += [nn.BatchNorm2d(channels)] if batch_norm else []
            convs += [nn.MaxPool2d(2), ACTIVATIONS[activation]()]
        self.conv = nn.Sequential(*convs)
        norm = [nn.BatchNorm1d(hidden_size)] if batch_norm else []
        self.fc = nn.Sequential(
            nn.Flatten(),
            nn.Linear(flat, hidden_size, bias=not batch_norm),
            *norm,
            ACTIVATIONS[activation](),
            nn.Linear(hidden_size, out_features),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[n, in_channels, image_size, image_size]`` to outputs ``[n, out_features]``.

        Those of one channel may come without it: ``[n, image_size, image_size]``, as MNIST's do.
        """
        if self.in_channels == 1 and inputs.dim() == 3:
            inputs = inputs.unsqueeze(1)
        if inputs.is_cpu:  # channels last in memory: pooling takes a sixth of the time then, and a step six tenths
            inputs = inputs.movedim(-3, -1).contiguous().movedim(-1, -3)
        outputs: Tensor = self.fc(self.conv(inputs))
        return outputs
