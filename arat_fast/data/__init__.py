"""Datasets as batches on the device."""

from arat_fast.data.batches import Batch, Batches, ResidentBatches
from arat_fast.data.dali import DaliBatches
from arat_fast.data.framing import Framing, Shift
from arat_fast.data.holdout import stratified_split
from arat_fast.data.load import DataSplits, load_data
from arat_fast.data.loader import LoaderBatches
from arat_fast.data.plan import BatchPlan, MixedPlan, Shard, seeded_generator

__all__ = [
    "Batch",
    "BatchPlan",
    "Batches",
    "DaliBatches",
    "DataSplits",
    "Framing",
    "LoaderBatches",
    "MixedPlan",
    "ResidentBatches",
    "Shard",
    "Shift",
    "load_data",
    "seeded_generator",
    "stratified_split",
]
