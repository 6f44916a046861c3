"""A small transformer that continues sequences."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from lightning_l2l.arguments import check_at_least, check_fits_memory

_MOST_LAYERS = 100


class Transformer(nn.Module):
    """Decoder with causal self-attention: from the tokens up to each position, scores of the one that follows.

    Token and position have an embedding of ``hidden_size`` each, which are added; a layer is attention and then a
    network of 4 * ``hidden_size`` GELU units, each after a layer norm and beside a residual connection; a layer norm
    and a linear map give the scores. There is no dropout. As a `NetworkTask` with the data of `SequenceDataModule`
    its loss is the mean cross entropy over all positions.

    Args:
        vocab_size: Number of different tokens, at least 1.
        hidden_size: Size of an embedding, a multiple of ``num_heads``.
        num_heads: Attention heads of a layer, at least 1.
        num_layers: From 1 to 100.
        sequence_length: Most tokens of a sequence, at least 1.

    Raises:
        ValueError: If a size is out of range or needs more memory than there is, or ``num_heads`` does not divide
            ``hidden_size``.

    Example:
        >>> Transformer(vocab_size=7)(torch.zeros(5, 16, dtype=torch.int64)).shape
        torch.Size([5, 7, 16])

    References:
        Vaswani et al., *Attention is all you need*, 2017, https://arxiv.org/abs/1706.03762; Radford et al., *Language
        models are unsupervised multitask learners*, 2019 (layer norms before, not after)
    """

    def __init__(
        self,
        vocab_size: int = 16,
        hidden_size: int = 16,
        num_heads: int = 2,
        num_layers: int = 1,
        sequence_length: int = 16,
    ) -> None:
        super().__init__()
        check_at_least(1, vocab_size=vocab_size, hidden_size=hidden_size, num_heads=num_heads)
        check_at_least(1, _MOST_LAYERS, num_layers=num_layers)
        check_at_least(1, sequence_length=sequence_length)
        if hidden_size % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide hidden_size={hidden_size}; use hidden_size="
                f"{-(-hidden_size // num_heads) * num_heads}"
            )
        num_bytes = 4 * hidden_size * (2 * vocab_size + sequence_length + 12 * num_layers * hidden_size)
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers}
        check_fits_memory(num_bytes, **sizes, sequence_length=sequence_length)
        self.vocab_size, self.hidden_size, self.num_heads = vocab_size, hidden_size, num_heads
        self.num_layers, self.sequence_length = num_layers, sequence_length
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(sequence_length, hidden_size)
        self.layers = nn.Sequential(*[_Layer(hidden_size, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(hidden_size)
        self.scores = nn.Linear(hidden_size, vocab_size)

    def forward(self, inputs: Tensor) -> Tensor:
        """Score every token as the next one.

        Args:
            inputs: Tokens, integers in [0, vocab_size), ``[n, length]``, length at most ``sequence_length``.

        Returns:
            ``[n, vocab_size, length]``, where ``cross_entropy`` has the classes. Those at a position depend on the
            inputs up to it alone.

        Raises:
            ValueError: If the sequences are too long, or are none.
        """
        if inputs.dim() != 2 or inputs.is_floating_point() or inputs.shape[1] > self.sequence_length:
            kind = f"{list(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
            raise ValueError(
                f"inputs {kind} are not sequences of at most sequence_length={self.sequence_length} tokens; give "
                "integers [n, length]"
            )
        hidden = self.tokens(inputs.long()) + self.positions.weight[: inputs.shape[1]]
        scores: Tensor = self.scores(self.norm(self.layers(hidden)))
        return scores.transpose(1, 2)


class _Layer(nn.Module):
    """Attention and a network of two layers."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attend, self.mix = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.widen, self.narrow = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[n, length, hidden_size]`` to the same shape."""
        hidden = hidden + self.mix(self._attention(self.attend(self.norm1(hidden))))
        added: Tensor = self.narrow(gelu(self.widen(self.norm2(hidden))))
        return hidden + added

    def _attention(self, projected: Tensor) -> Tensor:
        # Matrix products and a softmax, written out: torch's own function has kernels without second derivatives, and
        # of which vmap makes a loop.
        n, length, width = projected.shape
        heads = projected.view(n, length, 3, self.num_heads, width // (3 * self.num_heads))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [n, num_heads, length, size of a head]
        weights = queries @ keys.transpose(2, 3) / math.sqrt(queries.shape[3])
        later = torch.ones(length, length, dtype=torch.bool, device=projected.device).triu(1)
        found = weights.masked_fill(later, -math.inf).softmax(3) @ values
        return found.transpose(1, 2).reshape(n, length, width // 3)
