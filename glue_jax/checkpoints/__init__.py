"""Experts from files, and blends to files. In a clone, `pip install '.[io]'` installs what it needs.

- `open_checkpoint` reads what a file or a folder holds, without the weights.
- `load_experts` reads experts into one stacked pytree, for `glue_jax.learn`.
- `blend_files` blends files one tensor after another, and writes the blend.
- `save_blend` writes a model that is in memory, with the names, shapes and dtypes of an expert's file.
- `load_adapters`, `merge_adapters`, `add_adapter` and `save_adapter` do the same for LoRA adapters of PEFT.

Four formats are read: safetensors (a file, or a folder of Hugging Face), orbax, PyTorch (`.pt`, `.pth`, `.bin`,
`.ckpt`, if PyTorch is installed), and LoRA adapters of PEFT (`glue_jax.checkpoints.adapters`).
"""

from glue_jax.checkpoints.adapters import Adapters, add_adapter, load_adapters, merge_adapters, save_adapter
from glue_jax.checkpoints.formats import Checkpoint, open_checkpoint, open_checkpoints
from glue_jax.checkpoints.loading import load_experts
from glue_jax.checkpoints.saving import blend_files, save_blend

__all__ = [
    "Adapters",
    "Checkpoint",
    "add_adapter",
    "blend_files",
    "load_adapters",
    "load_experts",
    "merge_adapters",
    "open_checkpoint",
    "open_checkpoints",
    "save_adapter",
    "save_blend",
]
