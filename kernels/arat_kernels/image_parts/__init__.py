"""Images as high and low bfloat16 parts, for a first layer that computes in bfloat16."""

from arat_kernels.image_parts.api import image_parts

__all__ = ["image_parts"]
