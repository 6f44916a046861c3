"""Where random numbers come from: for a while a generator or a seed takes the place of torch's global state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the RNGs that a forward pass on ``device`` draws from; put them back as they were afterwards."""
    if device.type == "cpu":
        with global_rng(torch.Generator().manual_seed(seed)):
            yield
        return
    with torch.random.fork_rng([device], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            # not cuda.manual_seed, which means whichever device is the current one
            torch.cuda.default_generators[device.index].manual_seed(seed)
        else:
            torch.get_device_module(device).manual_seed(seed)
        yield


@contextmanager
def global_rng(generator: torch.Generator) -> Iterator[None]:
    """Let ``generator`` take the place of the global CPU generator, under which initialisers draw."""
    outer = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(outer)
