"""Saved networks, whoever wrote the file."""

from arat_fast.saved.official import (
    official_predictors_to_state_dict,
    official_to_state_dict,
    predictors_to_official,
    state_dict_to_official,
)
from arat_fast.saved.plain import export_plain, save_safetensors

__all__ = [
    "export_plain",
    "official_predictors_to_state_dict",
    "official_to_state_dict",
    "predictors_to_official",
    "save_safetensors",
    "state_dict_to_official",
]
