"""The commands ``generate``, which writes a model's answers to a dataset, and ``eval``, which scores a model on it."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lm_core.adapters import as_causal_lm
from lm_core.adapters.loading import DType, load_causal_lm, torch_dtype
from lm_core.checkpoints.atomic_io import write_file
from lm_core.checkpoints.checkpoint import checkpoint_folder
from lm_core.checks import typed
from lm_core.cli.text_generation import SamplingFlags
from lm_core.tokenizers import continuation_text, end_ids, load_tokenizer
from lm_core.training.accelerator import pick_device
from spin_trainer.data.given_answers import prompt_rows
from spin_trainer.data.iteration_data import IterationData
from spin_trainer.data.opponent_answers import Sampling
from spin_trainer.data.prompt_data import as_prompt_dataset
from spin_trainer.data.sft_data import Overlong, SFTDataset, as_sft_dataset
from spin_trainer.quickstart import sorting_task
from spin_trainer.quickstart.quickstart import quickstart_data
from spin_trainer.training.evaluation import evaluate, win_rate_over
from spin_trainer.training.weights import fingerprint_of_weights


@typed
@dataclass(frozen=True, kw_only=True)
class Answering(SamplingFlags):
    """Settings of generated answers: tokenizer, length, sampling, device.

    Args:
        template_kwargs: further arguments of the chat template in JSON, such as '{"enable_thinking": false}'.
        dtype: dtype of the loaded weights; auto keeps the stored one.
        max_seq_len: maximum length of a prompt with its answer, in tokens.
        max_new_tokens: maximum length of a generated answer; null is what max_seq_len leaves.
        batch_size: prompts per batch.
    """

    tokenizer: str | None = None
    template_kwargs: dict[str, Any] | None = None
    dtype: DType = "auto"
    max_seq_len: int = 512
    max_new_tokens: int | None = None
    temperature: float = 0.7
    top_p: float | None = 0.9
    batch_size: int = 16
    seed: int = 0
    device: str = "auto"

    def sampling(self, eos_id: tuple[int, ...], **changes: Any) -> Sampling:
        """Creates the ``Sampling`` of these settings; ``changes`` replace its fields."""
        names = {field.name for field in fields(self)} & {field.name for field in fields(Sampling)}
        return Sampling(**{**{name: getattr(self, name) for name in names}, "eos_id": eos_id or None, **changes})

    def open_tokenizer(self, model: str) -> Any:
        """Loads the tokenizer that was chosen, or that of the model."""
        return load_tokenizer(self.tokenizer or checkpoint_folder(model))

    def open_model(self, source: str, name: str) -> Any:
        """Loads the model in ``source`` as a ``CausalLM`` on the device; ``name`` names the argument in errors."""
        model = load_causal_lm(source, name=name, dtype=torch_dtype(self.dtype))
        return as_causal_lm(model.to(pick_device(self.device)))

    def read(self, data: str, tokenizer: Any, ends: tuple[int, ...], overlong: Overlong = "error") -> SFTDataset:
        """Reads the rows of ``data``."""
        return as_sft_dataset(
            data,
            max_seq_len=self.max_seq_len,
            tokenizer=tokenizer,
            eos_id=ends,
            template_kwargs=self.template_kwargs,
            overlong=overlong,
            name="data",
        )


def generate(model: str, data: str, output: str, *, answering: Answering, overlong: Overlong = "error") -> int:
    """Writes a model's answers to every prompt of a dataset, next to the human ones; run it again to resume.

    Args:
        model: model that answers: folder of an exported policy or other model, or organisation/name on the hub.
        data: rows with prompt and response, or with messages: a file, folder, glob or data set on the hub.
        output: .jsonl file to write; completed rows are stored in a folder next to it.
        answering: settings of the answers.
        overlong: handling of prompts that leave no room for an answer: error, or drop the row.
    """
    if not output.endswith(".jsonl"):
        raise ValueError(f"output must be a .jsonl file, got {output!r}")
    target = Path(output).expanduser()
    # tokenizer, model and dataset
    encoder, policy = answering.open_tokenizer(model), answering.open_model(model, "model")
    ends = end_ids(encoder, policy)
    dataset = answering.read(data, encoder, ends, overlong)
    rows = IterationData(
        dataset=dataset,
        root=target.with_suffix(".rows"),
        sampling=answering.sampling(ends),
        split="generate",
        iteration=0,
        weights=fingerprint_of_weights(policy),
    )
    # generate the rows that are not on disk yet
    rows.complete(policy, scores=False)
    lines = [
        {
            "prompt": encoder.decode(example.prompt),
            "real": continuation_text(encoder, example.prompt, example.response),
            "generated": continuation_text(encoder, example.prompt, answer.tokens),
            "finished": answer.finished,
        }
        for example, answer in zip(dataset, rows.answers, strict=True)
    ]
    write_file(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    summary = ", ".join(f"{name} {value:.3f}" for name, value in rows.summary().items())
    print(f"wrote {output}: {len(lines)} rows, {summary}")
    return 0


def prompts(model: str, data: str, output: str, *, answering: Answering, overlong: Overlong = "error") -> int:
    """Writes the prompts of a dataset as text and token ids, for answers that another engine makes (--answers).

    Args:
        model: model whose tokenizer writes the prompts: a folder, or organisation/name on the hub.
        data: rows with prompt and response, with messages, or with prompts alone.
        output: .jsonl file to write.
        answering: settings, of which tokenizer, template_kwargs and max_seq_len matter.
        overlong: handling of prompts that leave no room for an answer: error, or drop the row.
    """
    if not output.endswith(".jsonl"):
        raise ValueError(f"output must be a .jsonl file, got {output!r}")
    tokenizer = answering.open_tokenizer(model)
    dataset = as_prompt_dataset(
        data,
        max_seq_len=answering.max_seq_len,
        tokenizer=tokenizer,
        template_kwargs=answering.template_kwargs,
        overlong=overlong,
        name="data",
    )
    rows = prompt_rows(dataset, tokenizer)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_file(Path(output).expanduser(), "".join(f"{line}\n" for line in lines))
    print(f"wrote {output}: {len(rows)} prompts, {dataset.dropped} rows left out")
    return 0


def evaluate_model(
    model: str,
    data: str | None = None,
    *,
    answering: Answering,
    opponent_model: str | None = None,
    exact_match: bool = True,
) -> int:
    """Prints a model's scores on a dataset: likelihood, exact match, win rate over an opponent.

    Args:
        model: model to evaluate: folder of an exported policy or other model, or organisation/name on the hub.
        data: rows with prompt and response, or with messages; null is the quickstart's held-out rows.
        answering: settings of the opponent's answers.
        opponent_model: model to compute the win rate against; null skips the win rate.
        exact_match: whether to answer prompts greedily and compare with the human answers.
    """
    ends: tuple[int, ...] = (sorting_task.EOS,)
    length = answering.max_seq_len
    policy = answering.open_model(model, "model")
    if data is None:
        dataset, length = quickstart_data()[2], sorting_task.MAX_SEQ_LEN
    else:
        encoder = answering.open_tokenizer(model)
        ends = end_ids(encoder, policy)
        dataset = answering.read(data, encoder, ends)
    rows: dict[str, Any] = {"batch_size": answering.batch_size, "exact_match": exact_match}
    scored = evaluate(policy, dataset, max_seq_len=length, eos_id=ends, **rows)
    print(
        f"{scored.nll_per_sequence:.4f} nats/answer, {scored.nll_per_token:.4f} nats/token "
        f"over {scored.tokens:,} tokens"
    )
    if scored.exact_match is not None:
        print(f"{scored.exact_match:.4f} exact match over {scored.sequences:,} greedy answers")
    if opponent_model is not None:
        opponent = answering.open_model(opponent_model, "opponent_model")
        sampling = answering.sampling(ends, max_seq_len=length, seed=0)
        rate = win_rate_over(policy, opponent, dataset, sampling, seed=answering.seed)
        print(f"{rate:.4f} win rate over {opponent_model}")
    return 0
