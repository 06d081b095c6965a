"""Many processes as one: started by torchrun, they share every batch and every evaluation."""

from arat_fast.distributed.ranks import ALONE, Place, Ranks, join, place_of

__all__ = ["ALONE", "Place", "Ranks", "join", "place_of"]
