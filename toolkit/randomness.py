"""The global random generators of torch, Python and numpy: compared, seeded, put back as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def states(model: nn.Module | None = None) -> dict[str, Any]:
    """The states of the global generators, and of those that a model has of its own, to be compared."""
    name, keys, *rest = np.random.get_state()
    own = [v for m in (model.modules() if model else ()) for v in vars(m).values() if isinstance(v, torch.Generator)]
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": [state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)],
        "Python": random.getstate(),
        "numpy": (name, bytes(keys), *rest),  # type: ignore[arg-type]
        "the model": [generator.get_state().numpy().tobytes() for generator in own],
    }


def seed_all(seed: int, devices: bool = True) -> None:
    """Seeds the global generators with 63 bits; those of other `devices` only if asked for."""
    random.seed(seed)
    np.random.seed([seed % 2**32, (seed >> 32) % 2**32])
    torch.manual_seed(seed) if devices else torch.default_generator.manual_seed(seed)


@contextmanager
def kept(seed: int | None = None, devices: bool = True) -> Iterator[None]:
    """The global generators as they were, whatever happens within, where they are seeded with `seed` if there is one. Those of
    other `devices` only if asked for, since that waits for them."""
    gpus = range(torch.cuda.device_count()) if devices and torch.cuda.is_initialized() else ()
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(gpus):
            if seed is not None:
                seed_all(seed, devices)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
