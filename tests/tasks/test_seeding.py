import pytest
import torch

from lightning_l2l.tasks.seeding import global_rng, seeded

CPU = torch.device("cpu")


def test_a_generator_takes_the_global_ones_place_and_goes_on():
    generator, twin = (torch.Generator().manual_seed(5) for _ in range(2))
    before = torch.get_rng_state()
    for _ in range(2):
        with global_rng(generator):
            assert torch.equal(torch.rand(3), torch.rand(3, generator=twin))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)])
def test_a_seed_decides_what_is_drawn_and_no_more(device):
    device = torch.device(device)
    drawn = []
    for seed in (1, 1, 2):
        torch.rand(3, device=device)  # the global state has no say
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        with seeded(device, seed):
            drawn.append(torch.cat([torch.rand(3, device=device).cpu(), torch.rand(3)]))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert before[1] is None or torch.equal(torch.cuda.get_rng_state(device), before[1])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("replaced", [lambda: seeded(CPU, 1), lambda: global_rng(torch.Generator())])
def test_after_an_error_the_global_state_is_as_it_was(replaced):
    before = torch.get_rng_state()
    with pytest.raises(KeyError), replaced():
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
