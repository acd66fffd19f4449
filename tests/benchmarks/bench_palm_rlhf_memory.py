"""Memory that actor, critic, reference and reward model add to the PaLM that they all are scopes of.

    nox -s bench -- palm_rlhf_memory

Weights are counted as storages, each once, so that a copy of the base would show; "process" is what the system says
this process holds more than before (Linux). Rows: the base, the four roles around it, and the same after one PPO update
with the gradients and AdamW's state of what is trained. The axis is the base's size.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measure import arguments, report
from torch import Tensor

from palm_rlhf import PaLM, RewardModel, RLHFTrainer

# parameters in millions: sizes
SIZES = {
    25: {"dim": 512, "depth": 7, "heads": 8},
    100: {"dim": 768, "depth": 12, "heads": 12},
}
WARM_UP = {"dim": 32, "depth": 1, "heads": 1}


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident() -> int | None:
    """Bytes that this process holds in memory; None where the system does not tell this way."""
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) * 1024


def rows_of(sizes: dict[str, int]) -> list[dict[str, Any]]:
    palm = PaLM(num_tokens=256, **sizes)
    with torch.no_grad():
        for parameter in palm.parameters():
            parameter.add_(0)  # every page has been touched
    base, process = held(palm.state_dict(keep_vars=True).values()), resident()
    what = f"PaLM of {sum(parameter.numel() for parameter in palm.parameters()) / 1e6:.0f} M parameters"
    rows = [{"what": what, "MB": base / 1e6}]

    reward_model = RewardModel(palm)
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=reward_model,
        prompt_token_ids=torch.randint(256, (4, 8)),
        epochs=1,
        device="cpu",
    )
    modules = (trainer.actor_critic, reward_model)
    weights = [tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()]
    row: dict[str, Any] = {"what": "+ actor, critic, reference, reward model", "MB": held(weights) / 1e6}
    row["over the base"] = f"{100 * (held(weights) / base - 1):.2f} %"
    if process is not None:
        row["process, over the base"] = f"{100 * ((resident() or 0) - process) / base:.2f} %"
    rows.append(row)

    trainer.optimizer.zero_grad = lambda **_: None  # type: ignore[method-assign]  # keeps the gradients to be counted
    trainer.train(num_episodes=4, update_timesteps=4, max_new_tokens=4)
    trained = [*trainer.actor_parameters, *trainer.critic_parameters]
    state = [value for one in trainer.optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]
    total = held([*weights, *(p.grad for p in trained if p.grad is not None), *state])
    over = f"{100 * (total / base - 1):.2f} %"
    rows.append({"what": "+ gradients and AdamW's state", "MB": total / 1e6, "over the base": over})
    return rows


def main() -> None:
    options = arguments(__doc__.splitlines()[0], millions={"type": int, "nargs": "+", "default": [25, 100]})
    rows_of(WARM_UP)  # imports, which would count as memory of the first model
    rows = [row for millions in options.millions for row in rows_of(SIZES[millions])]
    report("Memory of four roles on one base, LoRA of rank 8", rows, options.json)


if __name__ == "__main__":
    main()
