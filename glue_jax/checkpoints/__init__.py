"""Experts from files, and blends to files. This package needs `pip install 'glue_jax[io]'`.

- `open_checkpoint` reads what a file or a folder holds, without the weights.
- `load_experts` reads experts into one stacked pytree, for `glue_jax.learn`.
- `blend_files` blends files one tensor after another, and writes the blend.
- `save_blend` writes a model that is in memory, with the names, shapes and dtypes of an expert's file.

Four formats are read: safetensors (a file, or a folder of Hugging Face), orbax, PyTorch (`.pt`, `.pth`, `.bin`, if
PyTorch is installed), and LoRA adapters of PEFT (`glue_jax.checkpoints.adapters`).
"""

from glue_jax.checkpoints.formats import Checkpoint, open_checkpoint, open_checkpoints
from glue_jax.checkpoints.loading import load_experts
from glue_jax.checkpoints.saving import blend_files, save_blend

__all__ = ["Checkpoint", "blend_files", "load_experts", "open_checkpoint", "open_checkpoints", "save_blend"]
