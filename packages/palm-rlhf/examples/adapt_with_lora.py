"""Adapt a frozen PaLM with two LoRA scopes, then merge one of them into the weights.

Each scope learns to prefer one letter. The base takes no gradient, so scopes are trained, used and removed separately.
"""

import torch

from palm_rlhf import PaLM

torch.manual_seed(0)
palm = PaLM(num_tokens=128, dim=64, depth=2, dim_head=16, heads=4)
frozen = palm.token_emb.weight.clone()


def adapt(scope: str, letter: str) -> None:
    """Trains a scope on rows that end in one letter."""
    palm.add_finetune_params(scope, lora_r=4)
    optimizer = torch.optim.AdamW(palm.finetune_parameters(scope), lr=1e-2)
    for _ in range(40):
        ids = torch.cat((torch.randint(97, 123, (8, 8)), torch.full((8, 8), ord(letter))), dim=1)
        loss = palm(ids, return_loss=True, finetune_scope=scope)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"scope {scope!r}: loss {loss.item():.2f}")


def continuation(scope: str | None) -> str:
    """Greedy continuation of a fixed prompt."""
    prompt = torch.tensor(list(b"abc"))
    answer = palm.generate(max_new_tokens=8, prompt=prompt, temperature=0.0, finetune_scope=scope)
    return bytes(answer.tolist()).decode()


adapt("xs", "x")
adapt("os", "o")
print({scope: continuation(scope) for scope in ("xs", "os", None)})
assert torch.equal(palm.token_emb.weight, frozen)

merged = palm.merge_finetune_params("xs")
print("merged into the base:", continuation(None))
palm.unmerge_finetune_params(merged)
