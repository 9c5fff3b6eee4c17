"""Getting weights in and out: Hugging Face's GPT-2 checkpoints, and the bundled one."""

from weights.checkpoint import (
    GENERATION_FILE,
    CheckpointError,
    load_config,
    load_generation_config,
    load_tensors,
    locate,
    save_checkpoint,
    save_generation_config,
    stored_shapes,
)
from weights.names import huggingface_name

__all__ = [
    "GENERATION_FILE",
    "CheckpointError",
    "huggingface_name",
    "load_config",
    "load_generation_config",
    "load_tensors",
    "locate",
    "save_checkpoint",
    "save_generation_config",
    "stored_shapes",
]
