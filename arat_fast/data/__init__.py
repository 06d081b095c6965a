"""Datasets as batches on the device."""

from arat_fast.data.batches import (
    Batch,
    Batches,
    ResidentBatches,
    draw_crop_flip,
    seeded_generator,
)
from arat_fast.data.folder import FolderBatches
from arat_fast.data.load import DataSplits, load_data, stratified_split

__all__ = [
    "Batch",
    "Batches",
    "DataSplits",
    "FolderBatches",
    "ResidentBatches",
    "draw_crop_flip",
    "load_data",
    "seeded_generator",
    "stratified_split",
]
