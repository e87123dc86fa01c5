"""Keras's `compile` and `fit` with our AdamW, beside the native one.

python examples/keras_fit.py
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
from sklearn.datasets import load_digits

import portopt_tf


def network() -> keras.Sequential:
    """A small convolutional network, the same weights every time."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def main() -> None:
    """Train with each, and print loss and accuracy by epoch."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8, 1).astype("float32")
    for optimizer in (portopt_tf.AdamW(3e-3), keras.optimizers.AdamW(3e-3)):
        model = network()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        history = model.fit(
            *(images[:1408], labels[:1408]),
            validation_data=(images[1408:], labels[1408:]),
            epochs=4,
            verbose=0,
        ).history
        print(f"{type(optimizer).__module__.partition('.')[0]}.AdamW")
        for epoch, (mean, found) in enumerate(
            zip(history["loss"], history["val_accuracy"], strict=True), 1
        ):
            print(f"  epoch {epoch}  loss {mean:.4f}  validation accuracy {found:.3f}")


if __name__ == "__main__":
    main()
