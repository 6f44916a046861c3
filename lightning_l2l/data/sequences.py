"""Generated sequences, to be continued."""

import torch
from torch import Tensor

from lightning_l2l.arguments import check_at_least, check_fits_memory
from lightning_l2l.data.episodes import EpisodeDataModule, Stage
from lightning_l2l.data.loading import Sample
from lightning_l2l.data.options import CommonOptions, Unpack

_MOST_TOKENS = 256  # that a byte can tell apart
_MOST_LENGTH = 10_000
_SHARPNESS = 2.0  # standard deviation of the scores: of 16 tokens some 4 follow with a probability that counts


class SequenceDataModule(EpisodeDataModule):
    """Every task is one run over sequences of a Markov chain of its own; nothing is downloaded.

    The probabilities of the next token are a softmax of scores, i.i.d. Gaussian of standard deviation 2, for every
    tuple of the `order` tokens before it. A network that knows the chain has the chain's entropy as its loss; at
    first it is about log(vocab_size).

    A batch has `"inputs"`, int32 `[num_tasks, num_steps + 1, batch_size, sequence_length]`, `"targets"`, the tokens
    that follow those at the same places, uint8, of the same shape, and `"seed"`, int64 `[num_tasks]`. Minibatch t is
    used at theta_t for t = 0, ..., num_steps, hence one more than steps. A validation or test batch has, besides,
    sequences of the same chain on which the network is not trained: `"unseen_inputs"` and `"unseen_targets"`,
    `[num_tasks, num_unseen, sequence_length]`.

    Args:
        num_tasks: Number of tasks side by side in a training batch of each process.
        vocab_size: Number of different tokens, from 2 to 256.
        sequence_length: Tokens of a sequence, from 1 to 10,000.
        order: Number of tokens on which the next one depends, at least 1. From 2 on a network must look back.
        batch_size: Number of sequences in a minibatch of the optimizee.
        num_val_tasks: Number of validation tasks, over all processes.
        num_test_tasks: Number of test tasks, over all processes.
        num_unseen: Number of sequences that each validation or test task sets aside; 0 for none.
        **options: See `EpisodeDataModule`.

    Raises:
        ValueError: If a size is out of range or needs more memory than there is, or `seed`, `num_workers` or
            `num_unseen` is negative.

    Example:
        >>> data = SequenceDataModule(num_tasks=3, num_steps=10)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["inputs"].shape
        torch.Size([3, 11, 16, 16])
        >>> bool((batch["inputs"][..., 1:] == batch["targets"][..., :-1]).all())
        True
    """

    def __init__(
        self,
        num_tasks: int = 8,
        *,
        vocab_size: int = 16,
        sequence_length: int = 16,
        order: int = 1,
        batch_size: int = 16,
        num_val_tasks: int = 32,
        num_test_tasks: int = 32,
        num_unseen: int = 64,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(num_tasks, num_val_tasks=num_val_tasks, num_test_tasks=num_test_tasks, **options)
        check_at_least(2, _MOST_TOKENS, vocab_size=vocab_size)
        check_at_least(1, _MOST_LENGTH, sequence_length=sequence_length)
        check_at_least(1, 64, order=order)
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, num_unseen=num_unseen)
        check_fits_memory(8 * vocab_size ** (order + 1), vocab_size=vocab_size, order=order)
        check_fits_memory(5 * batch_size * sequence_length, batch_size=batch_size, sequence_length=sequence_length)
        check_fits_memory(5 * num_unseen * sequence_length, num_unseen=num_unseen, sequence_length=sequence_length)
        self.vocab_size, self.sequence_length, self.order = vocab_size, sequence_length, order
        self.batch_size, self.num_unseen = batch_size, num_unseen

    def sample(self, stage: Stage, generator: torch.Generator) -> Sample:
        """Draws a chain, `num_steps + 1` minibatches of its sequences and, except for training, those set aside."""
        if self.num_steps is None:
            raise RuntimeError("num_steps is not known yet; call setup() first, or give it")
        scores = torch.randn(self.vocab_size**self.order, self.vocab_size, generator=generator)
        up_to = (_SHARPNESS * scores.double()).softmax(1).cumsum(1)  # where the share of each token ends
        num_unseen = 0 if stage == "train" else self.num_unseen
        num_seen = (self.num_steps + 1) * self.batch_size
        tokens = self._draw(up_to, num_seen + num_unseen, generator)
        inputs, targets = tokens[:, :-1].int(), tokens[:, 1:].to(torch.uint8)
        shape = (self.num_steps + 1, self.batch_size, self.sequence_length)
        sample: Sample = {"inputs": inputs[:num_seen].view(shape), "targets": targets[:num_seen].view(shape)}
        if num_unseen:
            sample["unseen_inputs"], sample["unseen_targets"] = inputs[num_seen:], targets[num_seen:]
        return sample

    def _draw(self, up_to: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """Sequences `[number, sequence_length + 1]`; row c of `up_to` is for tuple c, whose tokens are digits of c."""
        contexts, size = up_to.shape
        edges = (up_to + torch.arange(contexts)[:, None]).flatten()  # one row after the other, from c to c + 1
        context = torch.randint(contexts, (number,), generator=generator)
        tokens = torch.empty(number, self.sequence_length + 1, dtype=torch.int64)
        for place in range(self.sequence_length + 1):
            share = torch.rand(number, generator=generator)
            token = torch.searchsorted(edges, context + share.double(), right=True) - context * size
            tokens[:, place] = token.clamp_(max=size - 1)  # a row may end a little below 1
            context = (context * size + tokens[:, place]) % contexts
        return tokens
