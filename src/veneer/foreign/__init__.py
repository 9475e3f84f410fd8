"""Files of LyCORIS and of kohya's scripts, which many image tools share: one `.safetensors` whose keys are flattened module paths.

`keys` knows their spelling, `algorithms` what their tensors mean as a change of W, `native` which of them are one of our methods tensor by tensor. What is not becomes
LoRA by the algebra, like any other adapter.
"""

from .reading import Foreign, is_foreign, read_foreign
from .writing import save_foreign

__all__ = ["Foreign", "is_foreign", "read_foreign", "save_foreign"]
