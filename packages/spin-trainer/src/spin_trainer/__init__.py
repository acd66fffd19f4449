"""spin_trainer: self-play fine-tuning (SPIN, arXiv 2401.01335) of any causal language model.

>>> import torch
>>> from spin_trainer import SPIN
>>> model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16))
>>> spin = SPIN(model, lambda_=0.1)
>>> real, generated = torch.randint(0, 16, (2, 12)), torch.randint(0, 16, (2, 10))
>>> loss = spin(generated, real, prompt_len=torch.tensor([4, 5]))
>>> round(loss.item(), 4)  # ln 2: policy and opponent have the same weights
0.6931
"""

from spin_trainer.data.preference_data import Preference, as_preference_dataset
from spin_trainer.data.sft_data import Example, SFTDataset, as_sft_dataset
from spin_trainer.interop import load_original_checkpoint
from spin_trainer.model.dropout import dropout_of, set_dropout_
from spin_trainer.model.losses import self_play_losses, self_play_margins, win_rate
from spin_trainer.model.preference_losses import PreferenceLoss
from spin_trainer.model.reference import FrozenReference, MovingReference
from spin_trainer.model.response_scores import (
    log_prob_from_model_and_seq,
    prompt_mask_from_len,
    response_log_probs,
    response_mask,
)
from spin_trainer.model.spin import SPIN, Comparison
from spin_trainer.training.config import SelfPlaySettings
from spin_trainer.training.dpo import DPOSettings, DPOTrainer
from spin_trainer.training.pair_trainer import SPINResult
from spin_trainer.training.policy_trainer import FineTuningResult
from spin_trainer.training.self_reward import SelfRewardingSettings, SelfRewardingTrainer
from spin_trainer.training.sft import SFTSettings, SFTTrainer
from spin_trainer.training.trainer import SPINTrainer

__all__ = [
    "SPIN",
    "Comparison",
    "DPOSettings",
    "DPOTrainer",
    "Example",
    "FineTuningResult",
    "FrozenReference",
    "MovingReference",
    "Preference",
    "PreferenceLoss",
    "SFTDataset",
    "SFTSettings",
    "SFTTrainer",
    "SPINResult",
    "SPINTrainer",
    "SelfPlaySettings",
    "SelfRewardingSettings",
    "SelfRewardingTrainer",
    "as_preference_dataset",
    "as_sft_dataset",
    "dropout_of",
    "load_original_checkpoint",
    "log_prob_from_model_and_seq",
    "prompt_mask_from_len",
    "response_log_probs",
    "response_mask",
    "self_play_losses",
    "self_play_margins",
    "set_dropout_",
    "win_rate",
]

__version__ = "0.1.0"
