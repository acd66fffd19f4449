"""palm_rlhf: PaLM language models and reinforcement learning from human feedback."""

__version__ = "0.1.0"
