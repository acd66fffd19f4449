"""Training of a bigram model on packed documents."""

from typing import Any

from torch.nn.functional import cross_entropy

from lm_core.data.packing import PackedBatches
from lm_core.distributed import rank, world_size
from lm_core.training.config import CommonSettings
from lm_core.training.session import TrainingResult, TrainingSession, adamw
from toy_model.model.bigram import ToyModel


class ToyTrainer:
    """Trains a ``ToyModel`` on documents; see ``TrainingSession`` for the arguments."""

    def __init__(self, model: ToyModel, data: Any, settings: CommonSettings, batch_size: int, **run: Any) -> None:
        self.session = TrainingSession("ToyTrainer", config=settings, packages=("toy-model",), **run)
        self.batches = PackedBatches(
            documents=data, sequence_length=32, batch_size=batch_size, eos_id=0, rank=rank(), world_size=world_size()
        )
        model.to(self.session.device)
        self.session.register(model=model, optimizer=lambda: adamw(model, settings), state={"batches": self.batches})

    def train(self) -> TrainingResult:
        """Runs to the last update."""
        with self.session.run() as session:
            for _ in session.steps():
                batch = next(self.batches).to(session.device)
                logits = session.module(batch.ids)
                session.backward(cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))
                session.log(session.optimizer_step())
        return session.result(TrainingResult)
