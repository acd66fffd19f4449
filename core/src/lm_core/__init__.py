"""Common parts of language models, one concept a module."""

from lm_core.adapters import as_causal_lm
from lm_core.causal_lm import CausalLM, Generation, eval_mode
from lm_core.checkpoints.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from lm_core.checkpoints.manifest import CheckpointError
from lm_core.checkpoints.pretrained import PretrainedMixin
from lm_core.data.corpora import Corpus, load_corpus, stdlib_corpus
from lm_core.data.documents import Documents, load_documents, read_texts
from lm_core.data.epochs import EpochOrder, UpdateOrder, permutation
from lm_core.data.jsonl import read_json_lines
from lm_core.data.packing import PackedBatch, PackedBatches, ValidationBatches, bits_per_byte
from lm_core.data.rows import load_rows
from lm_core.distributed import all_gather, all_reduce_sum, broadcast_object, is_distributed, rank, world_size
from lm_core.generation.beam_search import beam_search
from lm_core.generation.generate import generate, sample
from lm_core.generation.sampling import apply_repetition_penalty, gumbel_noise, gumbel_sample, min_p, top_k, top_p
from lm_core.losses.losses import (
    hidden_log_probs,
    hidden_log_probs_and_entropy,
    linear_cross_entropy,
    token_log_probs,
)
from lm_core.nn.attention import Attention, attend
from lm_core.nn.feedforward import SwiGLU
from lm_core.nn.kv_cache import KVCache
from lm_core.nn.masking import (
    left_pad,
    masked_mean,
    maybe_and_mask,
    positions_from_mask,
    prompt_mask_from_lengths,
    right_pad,
)
from lm_core.nn.norms import LayerNorm, RMSNorm, l2norm
from lm_core.nn.rotary import RotaryEmbedding, apply_rotary, rotate_half
from lm_core.rng import capture_rng, restore_rng, seed_everything
from lm_core.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from lm_core.training.accelerator import InterruptHandler, pick_device, pick_precision
from lm_core.training.metrics import MetricsLog, plot_curves, progress_bar, read_metrics
from lm_core.training.optimization import (
    LearningRateSchedule,
    NonFiniteGuard,
    clip_global_norm,
    finish_update,
    learning_rate_scale,
    optimizer_groups,
)
from lm_core.training.run_directory import RunDirectory

__all__ = [
    "Attention",
    "ByteTokenizer",
    "CausalLM",
    "Checkpoint",
    "CheckpointError",
    "Corpus",
    "Documents",
    "EpochOrder",
    "Generation",
    "HuggingFaceTokenizer",
    "InterruptHandler",
    "KVCache",
    "LayerNorm",
    "LearningRateSchedule",
    "MetricsLog",
    "NonFiniteGuard",
    "PackedBatch",
    "PackedBatches",
    "PretrainedMixin",
    "RMSNorm",
    "RotaryEmbedding",
    "RunDirectory",
    "SwiGLU",
    "Tokenizer",
    "UpdateOrder",
    "ValidationBatches",
    "all_gather",
    "all_reduce_sum",
    "apply_repetition_penalty",
    "apply_rotary",
    "as_causal_lm",
    "attend",
    "beam_search",
    "bits_per_byte",
    "broadcast_object",
    "capture_rng",
    "clip_global_norm",
    "eval_mode",
    "finish_update",
    "generate",
    "gumbel_noise",
    "gumbel_sample",
    "hidden_log_probs",
    "hidden_log_probs_and_entropy",
    "is_distributed",
    "l2norm",
    "latest_checkpoint",
    "learning_rate_scale",
    "left_pad",
    "linear_cross_entropy",
    "list_checkpoints",
    "load_checkpoint",
    "load_corpus",
    "load_documents",
    "load_rows",
    "load_tokenizer",
    "masked_mean",
    "maybe_and_mask",
    "min_p",
    "optimizer_groups",
    "permutation",
    "pick_device",
    "pick_precision",
    "plot_curves",
    "positions_from_mask",
    "progress_bar",
    "prompt_mask_from_lengths",
    "rank",
    "read_json_lines",
    "read_metrics",
    "read_texts",
    "restore_rng",
    "right_pad",
    "rotate_half",
    "sample",
    "save_checkpoint",
    "seed_everything",
    "stdlib_corpus",
    "token_log_probs",
    "top_k",
    "top_p",
    "world_size",
]

__version__ = "0.1.0"
