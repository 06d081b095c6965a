"""Saved networks, whoever wrote the file."""

from arat_fast.saved.official import (
    load_official_checkpoint,
    official_predictors_to_state_dict,
    official_to_state_dict,
    predictors_to_official,
    state_dict_to_official,
)
from arat_fast.saved.plain import export_plain, load_safetensors, save_safetensors

__all__ = [
    "export_plain",
    "load_official_checkpoint",
    "load_safetensors",
    "official_predictors_to_state_dict",
    "official_to_state_dict",
    "predictors_to_official",
    "save_safetensors",
    "state_dict_to_official",
]
