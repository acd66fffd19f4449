"""Random states: seeding all generators of a process, capturing their states and restoring them.

States are tensors and plain numbers, so that a checkpoint can be read with ``weights_only=True``: numpy's own state
objects would need an unpickler.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lm_core.checks import typed


@typed
def seed_everything(seed: int) -> None:
    """Seeds python, numpy and torch (every device).

    Raises:
        ValueError: the seed is outside [0, 2**32), the range that numpy takes.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global state is what other libraries draw from
    torch.manual_seed(seed)


def capture_rng(generators: Mapping[str, torch.Generator] | None = None) -> dict[str, Any]:
    """The state of python's, numpy's and torch's generators, and of named ``generators``."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - see seed_everything
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "kind": numpy_state["bit_generator"],
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "position": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": {name: generator.get_state() for name, generator in (generators or {}).items()},
    }
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_rng(state: Mapping[str, Any], generators: Mapping[str, torch.Generator] | None = None) -> None:
    """Restores the states of ``capture_rng``; draws continue as if uninterrupted.

    Raises:
        ValueError: the state does not come from ``capture_rng``, or was captured with another number of CUDA devices
            or other named generators. Nothing is changed in that case.
    """
    missing = {"python", "numpy", "torch", "cuda", "generators"} - set(state)
    if missing:
        raise ValueError(f"state must come from capture_rng, got one without {sorted(missing)}")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if state["cuda"] and len(state["cuda"]) != devices:
        raise ValueError(f"state was taken with {len(state['cuda'])} CUDA devices, but there are {devices}")
    named = dict(generators or {})
    if set(named) != set(state["generators"]):
        raise ValueError(f"state has the generators {sorted(state['generators'])}, but {sorted(named)} are to be set")
    python, numpy_state = state["python"], state["numpy"]
    if numpy_state["kind"] != "MT19937":
        raise ValueError(f"state has numpy's bit generator {numpy_state['kind']!r}, only MT19937 can be put back")
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(  # noqa: NPY002 - see seed_everything
        (
            "MT19937",
            numpy_state["key"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["gauss"],
        )
    )
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())
    for name, generator in named.items():
        generator.set_state(state["generators"][name].cpu())
