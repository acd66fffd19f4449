"""The PaLM language model and its LoRA scopes."""
