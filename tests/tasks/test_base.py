import pytest
import torch

from lightning_l2l.tasks import MLP, NetworkTask, Quadratic, check_losses, init_from_seeds
from lightning_l2l.tasks.base import mix_seed


def test_mix_seed_is_splitmix64():
    # the first outputs of the reference generator seeded with 1234567
    assert [mix_seed(1234567, stream) for stream in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    assert mix_seed(-1, 0) == mix_seed(2**64 - 1, 0)


def test_upper_bits_of_a_seed_count():
    params, _ = init_from_seeds(Quadratic(), torch.tensor([1, 1 + 2**32, 1 + 2**33]))
    assert len({tuple(row) for row in params["theta"].tolist()}) == 3


def test_start_is_not_drawn_from_the_numbers_of_the_seed_itself():
    params, _ = init_from_seeds(Quadratic(), torch.tensor([3]))
    assert not torch.equal(params["theta"][0], torch.randn(10, generator=torch.Generator().manual_seed(3)))


def test_init_from_seeds_casts_floating_point_only():
    task = NetworkTask(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    params, buffers = init_from_seeds(task, torch.arange(2), device="cpu", dtype=torch.float64)
    assert {tensor.dtype for tensor in params.values()} == {torch.float64}
    assert buffers["1.running_var"].dtype == torch.float64
    assert buffers["1.num_batches_tracked"].dtype == torch.int64


def test_a_task_has_no_unseen_data_unless_it_says_so():
    params, _ = init_from_seeds(Quadratic(), torch.arange(2))
    assert Quadratic().unseen(params, {"W": torch.zeros(2, 10, 10), "y": torch.zeros(2, 10)}) == {}


@pytest.mark.parametrize("seeds", [torch.zeros(0, dtype=torch.int64), torch.tensor(3), torch.zeros(2, 1)])
def test_seeds_must_be_one_per_task(seeds):
    with pytest.raises(ValueError, match="one seed per task"):
        init_from_seeds(Quadratic(), seeds)


def test_default_device_does_not_matter():
    plain, _ = init_from_seeds(NetworkTask(MLP(3, 2, 1, 2)), torch.arange(2))
    with torch.device("meta"):
        task = NetworkTask(lambda: MLP(3, 2, 1, 2))
        built = task.init_params(1, torch.Generator(device="cpu").manual_seed(mix_seed(1, 0)))
        theta = Quadratic().init_params(1, torch.Generator(device="cpu"))["theta"]
    assert theta.device.type == "cpu"
    assert all(torch.equal(built[name][0], plain[name][1]) for name in plain)


def test_check_losses_accepts_what_is_right():
    check_losses(torch.tensor([1.0, 2.0]), 2, at_start=True)
    check_losses(torch.tensor([1.0, float("inf")]), 2, at_start=False)  # an optimizer may diverge


@pytest.mark.parametrize("losses", [torch.tensor(1.0), torch.ones(3), torch.ones(2, 1)])
@pytest.mark.parametrize("at_start", [True, False])
def test_check_losses_names_the_shape_and_the_remedy(losses, at_start):
    with pytest.raises(ValueError, match=r"expected \[num_tasks\] = \[2\].*no reduction over tasks") as error:
        check_losses(losses, 2, at_start=at_start)
    assert str(list(losses.shape)) in str(error.value) and "\n" not in str(error.value)


def test_check_losses_names_the_tasks_and_values():
    losses = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    with pytest.raises(ValueError, match=r"2 of 4 tasks .*1: nan, 3: inf\).*init_scale"):
        check_losses(losses, 4, at_start=True)
    with pytest.raises(ValueError, match=r"9 of 9 tasks .*4: nan, \.\.\.\)"):
        check_losses(torch.full((9,), float("nan")), 9, at_start=True)
