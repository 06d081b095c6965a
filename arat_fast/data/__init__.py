"""Datasets as batches on the device."""

from arat_fast.data.arrays import StreamedBatches
from arat_fast.data.batches import (
    Batch,
    Batches,
    ResidentBatches,
    draw_crop_flip,
)
from arat_fast.data.dali import DaliBatches
from arat_fast.data.holdout import stratified_split
from arat_fast.data.images import LoaderBatches
from arat_fast.data.load import DataSplits, load_data
from arat_fast.data.plan import BatchPlan, MixedPlan, Shard, seeded_generator

__all__ = [
    "Batch",
    "BatchPlan",
    "Batches",
    "DaliBatches",
    "DataSplits",
    "LoaderBatches",
    "MixedPlan",
    "ResidentBatches",
    "Shard",
    "StreamedBatches",
    "draw_crop_flip",
    "load_data",
    "seeded_generator",
    "stratified_split",
]
