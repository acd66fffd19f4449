"""vLLM as an engine of rollouts: prompts in, a ``Generation`` with the engine's own log-probs out.

The engine runs in this process and on this device, next to the model that is trained. It begins with random weights:
``update_weights`` sends those of a transformers model, with its adapters merged, whenever they have changed. Its
kernels round differently from training, so its log-probs differ from those of the model; a trainer corrects for that.

vLLM keeps state for the whole process: one engine can be open at a time, and ``close`` frees its memory.

Legend: b batch, new generated tokens.
"""

import copy
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_core.causal_lm import Generation
from lm_core.checks import check_above_zero, check_positive, check_temperature, typed
from lm_core.distributed import world_size
from lm_core.generation.decoding import as_eos_ids, prompt_rows
from lm_core.generation.sampling import filters_of
from lm_core.nn.masking import right_pad
from lm_core.rng import capture_rng, restore_rng

# fraction of the memory, on a CPU too: vLLM's default leaves no room for training
_MEMORY = 0.3
# top-k is refused above this, since the kept tokens of each step are returned as Python objects
_MAX_TOP_K = 1024
_ADVICE = "run in one process with VLLM_ENABLE_V1_MULTIPROCESSING=0 or without the variable"
_open: list["VLLMEngine"] = []


@dataclass(frozen=True)
class EngineGeneration(Generation):
    """A generation with the tokens that filters kept.

    Attributes:
        kept: ids of the tokens that each token was drawn from, by row and step; None without a filter.
    """

    kept: list[list[list[int]]] | None = None


class VLLMEngine:
    """A vLLM engine for a transformers causal language model.

    >>> engine = VLLMEngine(model)
    >>> engine.update_weights(model)
    >>> engine.generate([torch.tensor([1, 2, 3])], max_new_tokens=8).tokens

    Args:
        model: transformers causal language model, also with peft adapters or in ``lm_core.adapters``; only its
            configuration is read.
        tokenizer: transformers tokenizer, also in ``HuggingFaceTokenizer``; needed for stop strings only.
        dtype: dtype of the engine's weights; that of the model by default.
        requirement: what to install, for the error where vLLM is missing.
        **arguments: further arguments of ``vllm.LLM``, such as ``max_model_len`` and ``gpu_memory_utilization``.

    Raises:
        ImportError: vLLM is not installed.
        TypeError: the model is not of transformers.
        ValueError: there are several processes, or vLLM is told to start one of its own.
        RuntimeError: another engine is open in this process.
    """

    @typed
    def __init__(
        self,
        model: Any,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        requirement: str = "lm-core[vllm]",
        **arguments: Any,
    ) -> None:
        base = _transformers_model(model)
        if world_size() > 1:
            raise ValueError(f"engine 'vllm' needs a run of one process, got {world_size()}")
        if _open:
            raise RuntimeError("another vLLM engine is open in this process: close() it, or use it here")
        if os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
            raise ValueError(f"weights reach vLLM within one process only: {_ADVICE}")
        # vLLM would bind this process to some cores, and training with it
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        states = capture_rng()
        try:
            import vllm
        except ImportError as error:
            raise ImportError(f"engine 'vllm' needs vLLM: pip install '{requirement}' ({error})") from error
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        self.has_tokenizer = hasattr(inner, "save_pretrained") and hasattr(inner, "eos_token_id")
        device = next(base.parameters()).device
        settings = {
            "dtype": str(dtype or base.dtype).removeprefix("torch."),
            # on a CPU the graph would only be compiled, for a minute
            "enforce_eager": device.type == "cpu",
            "gpu_memory_utilization": _MEMORY,
            "max_logprobs": _MAX_TOP_K,
            **arguments,
        }
        with tempfile.TemporaryDirectory() as folder:
            base.config.save_pretrained(folder)
            if self.has_tokenizer:
                inner.save_pretrained(folder)
            try:
                self._llm: Any = vllm.LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=not self.has_tokenizer,
                    logprobs_mode="processed_logprobs",
                    **settings,
                )
            finally:
                restore_rng(states)
        self._sampling: Any = vllm.SamplingParams
        self.device = device
        self.vocab_size = int(base.config.get_text_config().vocab_size)
        _open.append(self)

    def close(self) -> None:
        """Frees the engine's memory; it cannot be used afterwards."""
        self._llm = None
        if self in _open:
            _open.remove(self)
        gc.collect()

    def update_weights(self, model: Any, *, adapters: Sequence[str] | None = None) -> None:
        """Replaces the engine's weights; ``model`` is not changed.

        Args:
            model: transformers model of the engine's architecture, also with adapters.
            adapters: peft adapters to merge; by default the active ones, none for the base alone.

        Raises:
            TypeError: the model is not of transformers.
            ValueError: as for ``merged_weights``.
        """
        with torch.no_grad():
            weights = merged_weights(model, adapters=adapters)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._llm.apply_model(_pack_output_layers)
        self._llm.reset_prefix_cache()

    @typed
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        eos_id: int | Sequence[int] | None = None,
        pad_id: int = 0,
        min_new_tokens: int = 0,
        repetition_penalty: float = 1.0,
        stop_strings: Sequence[str] = (),
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_kept: bool = True,
    ) -> EngineGeneration:
        """Generates a continuation of each prompt; arguments as in ``lm_core.generate``.

        Args:
            top_p, min_p: need ``top_k`` where the kept tokens are returned.
            stop_strings: texts that end a row with the token that completes them.
            generator: source of the seeds, one for each row; or one generator for each row.
            return_kept: False returns no kept tokens, which a policy's log-probs after a filter need.

        Returns:
            Tokens and the log-probs of the distribution they were drawn from, on the model's device.

        Raises:
            ValueError: an argument is out of range, or a prompt exceeds the engine's ``max_model_len``.
        """
        rows = [row.tolist() for row in prompt_rows(prompt)]
        check_positive(max_new_tokens, "max_new_tokens")
        check_temperature(temperature)
        check_above_zero(repetition_penalty, "repetition_penalty")
        filters_of(top_k=top_k, top_p=top_p, min_p=min_p)  # raises for a value out of range
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(f"min_new_tokens must be in [0, max_new_tokens = {max_new_tokens}], got {min_new_tokens}")
        if return_kept and top_k is None and not (top_p is None and min_p is None):
            raise ValueError(f"top_p and min_p need top_k with engine 'vllm', got {top_p} and {min_p} without")
        if return_kept and top_k is not None and top_k > _MAX_TOP_K:
            raise ValueError(f"top_k must be at most {_MAX_TOP_K} with engine 'vllm', got {top_k}")
        if stop_strings and not self.has_tokenizer:
            raise ValueError("stop_strings need an engine with a tokenizer of transformers, got none")
        limit = self._llm.llm_engine.model_config.max_model_len
        if (longest := max(map(len, rows))) + max_new_tokens > limit:
            raise ValueError(
                f"prompt ({longest} tokens) and max_new_tokens ({max_new_tokens}) exceed the engine's max_model_len "
                f"of {limit}"
            )
        ends = as_eos_ids(eos_id)
        settings = [
            self._sampling(
                temperature=temperature,
                top_k=top_k or 0,
                top_p=1.0 if top_p is None else max(top_p, 1e-9),  # vLLM refuses 0, the most likely token alone
                min_p=min_p or 0.0,
                repetition_penalty=repetition_penalty,
                max_tokens=max_new_tokens,
                min_tokens=min_new_tokens,
                stop_token_ids=list(ends) or None,
                ignore_eos=True,  # the ends are those of eos_id
                stop=list(stop_strings) or None,
                include_stop_str_in_output=True,
                skip_special_tokens=False,
                detokenize=bool(stop_strings),
                logprobs=top_k or 0 if return_kept else 0,
                seed=seed,
            )
            for seed in _seeds(generator, len(rows))
        ]
        states = capture_rng()  # the engine shares the process's generators
        try:
            outputs = self._llm.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)
        finally:
            restore_rng(states)
        answers = [output.outputs[0] for output in outputs]
        chosen = [
            [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]
            for answer in answers
        ]
        tokens, mask = right_pad([torch.tensor(list(answer.token_ids)) for answer in answers], pad_id)
        log_probs = nn.utils.rnn.pad_sequence([torch.tensor(values) for values in chosen], batch_first=True)
        kept = None
        if return_kept and top_k is not None:
            kept = [[_kept(step) for step in answer.logprobs] for answer in answers]
        return EngineGeneration(
            tokens=tokens.to(self.device),
            lengths=mask.sum(dim=1).to(self.device),
            log_probs=log_probs.to(self.device),
            finished=torch.tensor([answer.finish_reason == "stop" for answer in answers], device=self.device),
            kept=kept,
        )


def merged_weights(model: Any, *, adapters: Sequence[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Weights of a transformers model under the names of its checkpoint, adapters merged one layer at a time.

    Args:
        model: transformers model, also with peft adapters or in ``lm_core.adapters``; it is not changed.
        adapters: peft adapters to merge; by default the active ones, none for the base alone.

    Raises:
        TypeError: the model is not of transformers.
        ValueError: there is no such adapter, an adapter cannot be merged, or the weights are quantized.
    """
    base = _transformers_model(model)
    peft_model = getattr(model, "model", model) if hasattr(model, "init_cache") else model
    known: dict[str, Any] = getattr(peft_model, "peft_config", None) or {}
    active = list(getattr(peft_model, "active_adapters", ())) if known and adapters is None else list(adapters or ())
    if unknown := [name for name in active if name not in known]:
        raise ValueError(f"adapters must be among {sorted(known)}, got {', '.join(unknown)}")
    if active and getattr(known[active[0]], "is_prompt_learning", False):
        raise ValueError(f"adapter {active[0]!r} changes the input of the model and cannot be merged")
    is_tied = bool(getattr(base.config.get_text_config(), "tie_word_embeddings", False))
    originals = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    sent: set[int] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        if hasattr(module, "token_adapter"):
            raise ValueError(f"the trained tokens of {prefix.rstrip('.')} cannot be merged")
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):  # a layer trained whole
            whole: Any = module
            names = [name for name in active if name in whole.modules_to_save]
            module = whole.modules_to_save[names[-1]] if names else whole.original_module
        elif hasattr(module, "base_layer") and hasattr(module, "get_base_layer"):  # a layer with adapters
            tuned: Any = module
            module = tuned.get_base_layer()
            if names := [name for name in active if _has_adapter(tuned, name)]:
                if is_tied and isinstance(module, nn.Embedding):
                    raise ValueError(f"adapters of the tied embedding {prefix.rstrip('.')} cannot be merged")
                copied = copy.deepcopy(tuned)
                copied.merge(adapter_names=names)
                module = copied.get_base_layer()
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
                raise ValueError(f"weights must not be quantized, {prefix}{name} is {tensor.dtype}")
            if name in module._non_persistent_buffers_set or id(tensor) in sent:
                continue
            if id(tensor) in originals:  # not one of a merged copy, whose id the next copy may have
                sent.add(id(tensor))
            yield prefix + name, tensor.detach()
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.")

    return walk(base, "")


def _has_adapter(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, kind, {}) for kind in layer.adapter_layer_names)


def _transformers_model(model: Any) -> Any:
    """The transformers model inside of ``lm_core.adapters`` and peft."""
    inner = getattr(model, "model", model) if hasattr(model, "init_cache") else model
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if not (hasattr(base, "config") and hasattr(base.config, "save_pretrained") and hasattr(base, "dtype")):
        raise TypeError(f"engine 'vllm' needs a transformers model, got {type(base).__name__}")
    return base


def _pack_output_layers(model: nn.Module) -> None:
    """Packs output layers again for vLLM's CPU kernels: tied ones get no weights of their own on an update."""
    module: Any
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"generator must have one entry a row ({count}), got {len(generator)}")
        return [int(torch.randint(2**62, (), generator=own, device=own.device)) for own in generator]
    device = None if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def _kept(step: Any) -> list[int]:
    return [token for token, entry in step.items() if entry.logprob > -torch.inf]
