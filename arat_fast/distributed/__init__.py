"""Many processes as one: started by torchrun, they share every batch and every evaluation."""

from arat_fast.distributed.ranks import ALONE, Ranks, join
from arat_fast.distributed.watch import LeftBehindError

__all__ = ["ALONE", "LeftBehindError", "Ranks", "join"]
