"""`shard_slots`: optimizer state divided by ``keras.distribution``, on Keras's JAX backend."""

from __future__ import annotations

import keras


def shard_slots(optimizer: keras.optimizers.Optimizer) -> None:
    """Divide the slots of an optimizer among the devices of ``DataParallel``: ZeRO's stage 1.

    A slot is cut along its first axis that the number of devices divides; one that has none stays
    whole on each device. Weights stay whole, and ``fit`` keeps it so.

    Args:
        optimizer: Any of Keras's or of this package, built.

    Raises:
        RuntimeError: Keras does not run on JAX, or under no ``DataParallel`` distribution.
        ValueError: the optimizer is not built.
    """
    distribution = keras.distribution.distribution()
    backend = keras.backend.backend()
    if backend != "jax" or not isinstance(distribution, keras.distribution.DataParallel):
        raise RuntimeError(
            f"slots are sharded on jax under DataParallel, not on {backend} under {distribution}"
        )
    if not optimizer.built:
        raise ValueError("optimizer must be built: optimizer.build(model.trainable_variables)")
    mesh, batch = distribution.device_mesh, distribution.batch_dim_name
    devices = mesh.shape[mesh.axis_names.index(batch)]
    for variable in optimizer.variables:
        axes: list[str | None] = [None] * len(variable.shape)
        cut = [axis for axis, size in enumerate(variable.shape) if size and size % devices == 0]
        if cut:
            axes[cut[0]] = batch
        # Keras gives slots the layout of their weights, and has no other way to say one.
        variable._layout = keras.distribution.TensorLayout(axes, mesh)
        variable.assign(variable.value)
