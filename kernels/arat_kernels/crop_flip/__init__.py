"""Batch assembly from a dataset on the device: gather, random crop, flip, conversion."""

from arat_kernels.crop_flip.api import crop_flip, draw_crop_flip

__all__ = ["crop_flip", "draw_crop_flip"]
