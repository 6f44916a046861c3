"""The transformer: what it sees, how its copies run, and that it learns."""

import math

import pytest
import torch

from lightning_l2l.data import SequenceDataModule
from lightning_l2l.tasks import NetworkTask, Transformer, init_from_seeds


def batch_of(num_tasks=3, num_steps=2, **sizes):
    return next(iter(SequenceDataModule(num_tasks=num_tasks, num_steps=num_steps, **sizes).val_dataloader()))


def train(task, batch, num_steps):
    params, _ = init_from_seeds(task, batch["seed"])
    params = {name: value.requires_grad_() for name, value in params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    for step in range(num_steps):
        optimizer.zero_grad()
        task.loss(params, batch, step).sum().backward()
        optimizer.step()
    return task.unseen(params, batch)


def test_scores_depend_on_no_later_token():
    network, tokens = Transformer(vocab_size=7, num_layers=2), torch.arange(16).remainder(7)[None]
    for place in range(16):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 1) % 7
        changed = (network(tokens) != network(other)).any(1)[0]
        assert not changed[:place].any() and changed[place:].all()


def test_scores_depend_on_the_place_of_a_token():
    network = Transformer(vocab_size=7)
    scores = network(torch.zeros(1, 16, dtype=torch.int64))
    assert len(scores[0].T.unique(dim=0)) == 16


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_shorter_sequences_of_any_integers(dtype):
    assert Transformer()(torch.zeros(3, 5, dtype=dtype)).shape == (3, 16, 5)


def test_copies_run_side_by_side():
    """One call of the network for all of them, and the losses are those of each by itself."""
    task, batch = NetworkTask(Transformer()), batch_of(num_tasks=4)
    params, _ = init_from_seeds(task, batch["seed"])
    calls = []
    task._template.register_forward_pre_hook(lambda *_: calls.append(1))
    together = task.loss(params, batch, 1)
    assert len(calls) == 1
    for k in range(4):
        network = Transformer()
        network.load_state_dict({name: value[k] for name, value in params.items()})
        scores, targets = network(batch["inputs"][k, 1]), batch["targets"][k, 1].long()
        torch.testing.assert_close(together[k], torch.nn.functional.cross_entropy(scores, targets))


def test_the_loss_of_any_function_is_that_of_cross_entropy():
    batch = batch_of()
    losses = []
    for loss_fn in (torch.nn.functional.cross_entropy, torch.nn.CrossEntropyLoss()):
        task = NetworkTask(Transformer(), loss_fn=loss_fn)
        losses.append(task.loss(init_from_seeds(task, batch["seed"])[0], batch, 0))
    torch.testing.assert_close(*losses)


def test_a_small_one_learns_a_chain():
    """From about log(16) = 2.8 on sequences that it has not seen towards the chain's entropy, some 1.6."""
    unseen = train(NetworkTask(Transformer()), batch_of(num_tasks=2, num_steps=200), 200)
    assert (unseen["loss"] < 0.75 * math.log(16)).all()
    assert unseen["accuracy"].shape == (2,) and (unseen["accuracy"] > 3 / 16).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": 10, "num_heads": 4}, "num_heads=4 does not divide hidden_size=10; use hidden_size=12"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_layers": 101}, "num_layers=101 is too large; use at most 100"),
        ({"num_heads": True}, "num_heads=True"),
        ({"sequence_length": 10**9, "hidden_size": 10**4}, "hidden_size=10000, num_layers=1, sequence_length=10000"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**options)


def test_sequences_that_it_does_not_take():
    with pytest.raises(ValueError, match=r"inputs \[2, 17\] int64 are not .* sequence_length=16 tokens"):
        Transformer()(torch.zeros(2, 17, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"inputs \[2, 5\] float32 are not"):
        Transformer()(torch.zeros(2, 5))
    task, batch = NetworkTask(Transformer(vocab_size=3)), batch_of()
    with pytest.raises(ValueError, match="Transformer and its loss do not take inputs"):
        task.loss(init_from_seeds(task, batch["seed"])[0], batch, 0)
