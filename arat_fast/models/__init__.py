"""Networks with split BatchNorm, and the conversion of any network."""

from arat_fast.models.features import collect_features
from arat_fast.models.registry import MODELS, create_model, model_spec
from arat_fast.models.split_batch_norm import (
    SplitBatchNorm2d,
    convert_split_batch_norm,
    use_branch,
    use_statistics,
)

__all__ = [
    "MODELS",
    "SplitBatchNorm2d",
    "collect_features",
    "convert_split_batch_norm",
    "create_model",
    "model_spec",
    "use_branch",
    "use_statistics",
]
