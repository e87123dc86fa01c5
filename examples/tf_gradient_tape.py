"""A training loop of one's own in TensorFlow: `tf.GradientTape`, compiled by `tf.function`.

python examples/tf_gradient_tape.py
"""

from __future__ import annotations

import os

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}  # before the imports

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import portopt_tf


def main() -> None:
    """Train by a compiled step, and print the loss, and how often the step was traced."""
    images, labels = load_digits(return_X_y=True)
    data = tf.data.Dataset.from_tensor_slices(((images / 16).astype("float32"), labels))
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
    )
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = portopt_tf.SGD(learning_rate=0.05, momentum=0.9, nesterov=True)
    optimizer.build(model.trainable_variables)  # a compiled function may make no variables

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    for epoch in range(1, 6):
        batches = data.shuffle(2000, seed=epoch).batch(32, drop_remainder=True)
        losses = [float(step(x, y)) for x, y in batches]
        print(f"epoch {epoch}  loss {sum(losses) / len(losses):.3f}")
    print(f"{int(optimizer.iterations)} steps, traced {step.experimental_get_tracing_count()} time")


if __name__ == "__main__":
    main()
