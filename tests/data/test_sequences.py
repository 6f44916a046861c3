"""Sequences of Markov chains."""

import math

import pytest
import torch

from lightning_l2l.data import SequenceDataModule


def batch_of(stage="train", **options):
    data = SequenceDataModule(**{"num_tasks": 2, "num_steps": 3, **options})
    return next(iter(getattr(data, f"{stage}_dataloader")()))


def test_batches():
    batch = batch_of("val", sequence_length=5, batch_size=4, num_unseen=6)
    assert {name: (tuple(values.shape), values.dtype) for name, values in batch.items()} == {
        "inputs": ((2, 4, 4, 5), torch.int32),
        "targets": ((2, 4, 4, 5), torch.uint8),
        "unseen_inputs": ((2, 6, 5), torch.int32),
        "unseen_targets": ((2, 6, 5), torch.uint8),
        "seed": ((2,), torch.int64),
    }
    assert set(batch_of()) == set(batch_of("test", num_unseen=0)) == {"inputs", "targets", "seed"}


def test_targets_are_the_tokens_that_follow():
    batch = batch_of("val")
    for kind in ("", "unseen_"):
        assert torch.equal(batch[f"{kind}inputs"][..., 1:], batch[f"{kind}targets"][..., :-1].int())


@pytest.mark.parametrize("vocab_size", [2, 256])
def test_all_tokens_occur_and_no_others(vocab_size):
    batch = batch_of(vocab_size=vocab_size, batch_size=500)
    assert batch["inputs"].unique().tolist() == list(range(vocab_size))


def chances(batch, order, vocab_size):
    """Relative frequencies of the token that follows each tuple, as found in a task's sequences."""
    tokens = torch.cat([batch["inputs"].long(), batch["targets"][..., -1:].long()], -1)[0].flatten(0, 1)
    columns = [tokens[:, k : tokens.shape[1] - order + k] for k in range(order + 1)]
    flat = sum(column * vocab_size ** (order - k) for k, column in enumerate(columns)).flatten()
    counts = torch.bincount(flat, minlength=vocab_size ** (order + 1)).view(-1, vocab_size).double()
    return counts / counts.sum(1, keepdim=True)


@pytest.mark.parametrize("order", [1, 2])
def test_the_next_token_depends_on_as_many_before_it_as_the_order_says(order):
    """Whose probabilities are those of the scores, drawn first: here all of them are found again."""
    sizes = {"num_tasks": 1, "num_steps": 49, "vocab_size": 3, "batch_size": 2000, "sequence_length": 8}
    data = SequenceDataModule(order=order, **sizes)
    batch = {k: v[None] for k, v in data.sample("train", torch.Generator().manual_seed(5)).items()}
    scores = torch.randn(3**order, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(chances(batch, order, 3), (2 * scores.double()).softmax(1), atol=0.02, rtol=0)


def test_minibatches_and_unseen_sequences_differ():
    batch = batch_of("val", vocab_size=8)
    rows = torch.cat([batch["inputs"][0].flatten(0, 1), batch["unseen_inputs"][0]])
    assert len(rows.unique(dim=0)) == len(rows)


def test_tasks_have_chains_of_their_own():
    batch = batch_of(num_tasks=2, vocab_size=3, batch_size=1000)
    first, second = (chances({k: v[k0 : k0 + 1] for k, v in batch.items()}, 1, 3) for k0 in range(2))
    assert (first - second).abs().max() > 0.2


def test_entropy_lies_well_below_that_of_even_chances():
    scores = 2 * torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    entropy = torch.distributions.Categorical(logits=scores).entropy().mean()
    assert 1.2 < float(entropy) < 1.9 < math.log(16)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 1}, "vocab_size=1 is not an integer of 2 or more"),
        ({"vocab_size": 257}, "vocab_size=257 is too large; use at most 256"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"order": 0}, "order=0"),
        ({"order": 10}, "vocab_size=16, order=10 need"),
        ({"batch_size": 10**9}, "batch_size=1000000000, sequence_length=16 need"),
        ({"num_unseen": -1}, "num_unseen=-1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceDataModule(**options)


def test_num_steps_are_needed():
    with pytest.raises(RuntimeError, match="num_steps is not known yet"):
        next(iter(SequenceDataModule().train_dataloader()))
    with pytest.raises(ValueError, match="SequenceDataModule has num_steps=None"):
        SequenceDataModule().setup()
