"""`PeftModel`, what a user holds: the base model, adapted in place, behind the interface that users of the `peft` package know."""

from .files import WithFiles
from .weights import WithWeights

__all__ = ["PeftModel"]


class PeftModel(WithFiles, WithWeights):
    """A frozen model with adapters.

    Args:
        model: the base model; its layers are adapted in place.
        peft_config: a method's configuration.
        adapter_name: letters, digits, `_` and `-`.
        autocast_adapter_dtype: keep adapters in float32 where the base is in half precision.

    Raises:
        ConfigError: a configuration that cannot be used, or adapters that cannot live together.
        TargetError: target names that match nothing, or layers that cannot be adapted; the model is as it was.
    """
