"""Conversion of weights from and to other libraries.

``original`` and ``original_rlhf`` read weights of PaLM-rlhf-pytorch, ``cohere`` and ``peft_adapters`` read and write
Hugging Face's formats, and ``weight_files`` loads and converts single files.
"""

from palm_rlhf.interop.cohere import export_cohere, from_cohere, to_cohere
from palm_rlhf.interop.original import OriginalPaLM, from_palm_rlhf_pytorch, palm_state_from_original
from palm_rlhf.interop.original_rlhf import actor_critic_from_palm_rlhf_pytorch, reward_model_from_palm_rlhf_pytorch
from palm_rlhf.interop.peft_adapters import export_lora, import_lora
from palm_rlhf.interop.weight_files import convert_checkpoint, load_weights_file

__all__ = [
    "OriginalPaLM",
    "actor_critic_from_palm_rlhf_pytorch",
    "convert_checkpoint",
    "export_cohere",
    "export_lora",
    "from_cohere",
    "from_palm_rlhf_pytorch",
    "import_lora",
    "load_weights_file",
    "palm_state_from_original",
    "reward_model_from_palm_rlhf_pytorch",
    "to_cohere",
]
