"""Getting weights in and out: Hugging Face's GPT-2 checkpoints, and the bundled one."""

from weights.checkpoint import CheckpointError, load_config, load_tensors, locate, save_checkpoint, stored_shapes
from weights.names import huggingface_name

__all__ = [
    "CheckpointError",
    "huggingface_name",
    "load_config",
    "load_tensors",
    "locate",
    "save_checkpoint",
    "stored_shapes",
]
