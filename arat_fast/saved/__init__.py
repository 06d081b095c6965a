"""Saved networks, whoever wrote the file."""

from arat_fast.saved.plain import export_plain, save_safetensors

__all__ = ["export_plain", "save_safetensors"]
