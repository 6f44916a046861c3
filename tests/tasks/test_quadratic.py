import pytest
import torch

from lightning_l2l.tasks import Quadratic, init_from_seeds


def test_closed_form_of_loss_and_gradient():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(5, 4, 4, generator=g, dtype=torch.float64)
    y = torch.randn(5, 4, generator=g, dtype=torch.float64)
    theta = torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    losses = Quadratic(dim=4).loss({"theta": theta}, {"W": W, "y": y}, 0)
    residual = [W[k] @ theta[k] - y[k] for k in range(5)]
    torch.testing.assert_close(losses, torch.stack([r @ r for r in residual]))
    (gradient,) = torch.autograd.grad(losses.sum(), theta)
    torch.testing.assert_close(gradient, torch.stack([2 * W[k].T @ residual[k] for k in range(5)]))


def test_start_is_standard_gaussian():
    params, buffers = init_from_seeds(Quadratic(), torch.arange(400))
    theta = params["theta"]
    assert theta.shape == (400, 10) and not buffers
    assert abs(theta.mean().item()) < 0.06 and abs(theta.std().item() - 1) < 0.05


@pytest.mark.parametrize(
    ("W", "y", "theta"),
    [
        ((2, 5, 5), (2, 5), (2, 5)),
        ((3, 4, 4), (3, 4), (2, 4)),
        ((2, 4, 4), (2, 1), (2, 4)),
        ((2, 4, 4), (2, 4), (2, 1)),
    ],
)
def test_shapes_that_do_not_fit(W, y, theta):
    with pytest.raises(ValueError, match=r"do not fit Quadratic\(dim=4\).*same dim"):
        Quadratic(dim=4).loss({"theta": torch.zeros(theta)}, {"W": torch.zeros(W), "y": torch.zeros(y)}, 0)


def test_dim_must_be_positive():
    with pytest.raises(ValueError, match="dim=0"):
        Quadratic(dim=0)


def test_noise_is_that_of_a_seed_and_a_step_and_of_the_given_size():
    task, seeds = Quadratic(dim=4, noise=0.5), torch.arange(500)
    batch = {"W": torch.zeros(500, 4, 4), "y": torch.zeros(500, 4), "seed": seeds}
    params = {"theta": torch.zeros(500, 4)}
    losses = [task.loss(params, batch, step) for step in range(3)]  # the squares of the noise, summed
    assert torch.stack(losses).mean().item() == pytest.approx(4 * 0.25, rel=0.1)
    assert len(torch.cat(losses).unique()) == 1500
    assert torch.equal(task.loss(params, batch, 1), losses[1])
    alone = {name: values[7:8] for name, values in batch.items()}
    assert torch.equal(task.loss({"theta": torch.zeros(1, 4)}, alone, 1), losses[1][7:8])
    assert torch.equal(Quadratic(dim=4).loss(params, batch, 0), torch.zeros(500))


def test_noise_must_not_be_negative():
    with pytest.raises(ValueError, match=r"noise=-1\.0"):
        Quadratic(noise=-1.0)
    with pytest.raises(ValueError, match="noise=nan"):
        Quadratic(noise=float("nan"))
