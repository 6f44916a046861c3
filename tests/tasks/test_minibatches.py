import pickle

import pytest
import torch

from lightning_l2l.data import MNISTDataModule
from lightning_l2l.tasks.minibatches import Minibatches, Pool


@pytest.fixture
def pool():
    return Pool(torch.randint(256, (50, 3, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def order():
    return torch.randint(50, (4, 7, 5), dtype=torch.int32, generator=torch.Generator().manual_seed(1))


def test_it_is_the_tensor_that_it_stands_for(pool, order):
    want, found = pool.examples[order.long()], Minibatches(pool, order)
    assert found.shape == want.shape and len(found) == 4 and found.dim() == want.dim()
    assert found.dtype == want.dtype and found.device == want.device
    for t in range(7):
        assert torch.equal(found.select(1, t), want.select(1, t))
    assert torch.equal(found.select(0, 2), want.select(0, 2))
    for key in (slice(None), 1, slice(1, 3), (slice(None), slice(2, 5)), (0, 3), (2, 1, 4), (..., slice(2))):
        assert torch.equal(found[key], want[key] if key != (..., slice(2)) else want[:, :, :2])


def test_stack_puts_tasks_side_by_side(pool, order):
    found = Minibatches.stack([Minibatches(pool, one) for one in order])
    assert found.pool is pool and torch.equal(found[:], Minibatches(pool, order)[:])


def test_each_device_gets_the_pool_once(pool, order):
    found = Minibatches(pool, order).to("meta")
    assert found.device.type == "meta" and found.select(1, 0).shape == (4, 5, 3, 2)
    assert pool.on(found.device) is pool.on(found.device)
    assert pickle.loads(pickle.dumps(found)).pool.examples.device.type == "cpu"


@pytest.mark.parametrize("steps", [3, 3000])
def test_an_episode_of_mnist_takes_eight_bytes_an_image_and_step(mnist_root, steps):
    data = MNISTDataModule(mnist_root, num_steps=steps, batch_size=16, num_unseen=0, eval_tasks=2, num_val_tasks=2)
    data.setup()
    (batch,) = data.val_dataloader()
    tensors = [batch["inputs"].order, batch["targets"].order]
    assert sum(one.untyped_storage().nbytes() for one in tensors) == 8 * 2 * (steps + 1) * 16
    assert batch["inputs"].select(1, steps).shape == (2, 16, 28, 28)
