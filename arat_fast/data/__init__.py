"""Datasets as batches on the device."""

from arat_fast.data.batches import (
    Batch,
    Batches,
    ResidentBatches,
    draw_crop_flip,
)
from arat_fast.data.folder import FolderBatches
from arat_fast.data.load import DataSplits, load_data, stratified_split
from arat_fast.data.plan import BatchPlan, Shard, seeded_generator

__all__ = [
    "Batch",
    "BatchPlan",
    "Batches",
    "DataSplits",
    "FolderBatches",
    "ResidentBatches",
    "Shard",
    "draw_crop_flip",
    "load_data",
    "seeded_generator",
    "stratified_split",
]
