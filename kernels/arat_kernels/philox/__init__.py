"""Counter-based random numbers (Philox-4x32-10), the same on every device and in every
implementation.

The state is an int64 tensor ``rng = [seed, offset]`` on the device of the data. The seed is the
key; the offset is part of the counter, so that every offset gives numbers of its own. A CUDA graph
that holds ``rng[1].add_(1)`` draws new numbers at every replay without the host.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""
