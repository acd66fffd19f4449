"""What the original's trainer offers beside being called: small things that scripts written for it use."""

from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lm_core.distributed import rank
from spin_trainer.data.opponent_answers import seed_of
from spin_trainer.data.sft_data import as_sft_dataset
from spin_trainer.model.spin import SPIN
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.pair_comparison import PairComparison
from spin_trainer.training.pairs import PairTraining
from spin_trainer.training.state import RunState
from spin_trainer.training.weights import export_policy


class OriginalInterface:
    """Methods of ``SPINTrainer``, on what its constructor makes."""

    model: SPIN
    settings: SelfPlaySettings
    state: RunState
    compare: PairComparison
    pair_training: PairTraining
    checkpoint_folder: Path
    pad_id: int | None
    tokenizer: Any
    accelerator: Any
    _log: Any

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return rank() == 0

    @property
    def unwrapped_model(self) -> SPIN:
        """Policy and reference."""
        return self.model

    def print(self, *message: Any) -> None:
        """Prints on the main process."""
        self.accelerator.print(*message)

    def log(self, **data: Any) -> None:
        """Adds a row to the metrics of a running training, and sends it to accelerate's trackers."""
        if self._log is not None:
            self._log.log(self.state.steps, data)
        self.accelerator.log(data, step=self.state.steps)

    def wait(self) -> None:
        """Waits for all processes."""
        self.accelerator.wait_for_everyone()

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the policy, with its tokenizer, into a folder below ``checkpoint_folder``; every process calls it.

        Raises:
            FileExistsError: the folder is there and ``overwrite`` is False.
        """
        folder = self.checkpoint_folder / path
        export_policy(self.model.policy_model, folder, self.tokenizer, overwrite=overwrite)
        return folder

    def calc_spin_loss(self, real_seq: Int[Tensor, "b n"], prompt_len: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """The loss of a batch, with answers that the opponent gives now.

        Args:
            real_seq: prompts with human answers, padded with ``pad_id``.
            prompt_len: tokens of each prompt.
        """
        pairs = [
            (row[row != self.pad_id].tolist(), int(length)) for row, length in zip(real_seq, prompt_len, strict=True)
        ]
        dataset = as_sft_dataset(pairs, max_seq_len=self.settings.max_seq_len, pad_id=self.pad_id, name="real_seq")
        prompts = [example.prompt for example in dataset]
        seed = seed_of("live", self.settings.seed, self.state.iteration, self.state.steps)
        answers = self.pair_training.live_answers(prompts, seed)
        real = [example.response for example in dataset]
        return self.compare(prompts, real, [answer.tokens for answer in answers]).losses.mean()
