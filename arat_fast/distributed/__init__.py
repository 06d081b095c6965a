"""Many processes as one: started by torchrun, they share every batch and every evaluation."""

from arat_fast.distributed.ranks import ALONE, Place, Ranks, join, place_of
from arat_fast.distributed.watch import LeftBehindError

__all__ = ["ALONE", "LeftBehindError", "Place", "Ranks", "join", "place_of"]
