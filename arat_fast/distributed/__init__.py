"""Many processes as one: started by torchrun, they share every batch and every evaluation."""

from arat_fast.distributed.ranks import ALONE, Ranks, join

__all__ = ["ALONE", "Ranks", "join"]
