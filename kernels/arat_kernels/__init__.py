"""GPU kernels for adversarial training with split BatchNorm. Needs torch and triton only.

One package per operation; each exports its public function::

    from arat_kernels.split_batch_norm import split_batch_norm

Functions are not re-exported here: a function named as its package would hide the package.
"""
