"""Trains on the digits with Lion in one framework, named by the argument; prints the losses."""

import json
import sys

import numpy as np
from lion import Lion

from portopt import Optimizer, demo, tape

RULE = Lion(lr=1e-3, weight_decay=0.1, decoupled=True)


def in_numpy(task):
    model = tape.MLP([64, 128, 10], tape.Tanh)
    params = model.parameters()
    for name, param in params.items():
        param.value[...] = task.weights[name]
    optimizer = Optimizer(RULE, {name: param.value for name, param in params.items()})
    for x, y in task.batches(1):
        with tape.Autograd() as autograd:
            loss = tape.softmax_cross_entropy(model(x), y)
        optimizer.step(autograd.gradients(loss, params))
        yield float(loss.value)


def in_torch(task):
    import torch

    import portopt_torch

    params = [torch.nn.Parameter(torch.from_numpy(value)) for value in task.weights.values()]
    optimizer = portopt_torch.from_rule(RULE)(params)
    for x, y in task.batches(1):
        optimizer.zero_grad()
        hidden = torch.tanh(torch.nn.functional.linear(torch.from_numpy(x), *params[:2]))
        logits = torch.nn.functional.linear(hidden, *params[2:])
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
        loss.backward()
        optimizer.step()
        yield loss.item()


def in_keras(task):
    import keras

    import portopt_tf

    hidden = keras.layers.Dense(128, activation="tanh")
    model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10)])
    model.set_weights([value.T for value in task.weights.values()])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(portopt_tf.from_rule(RULE)(), loss)
    for x, y in task.batches(1):
        yield float(np.asarray(model.train_on_batch(x, y)))
        model.reset_metrics()


if __name__ == "__main__":
    train = {"numpy": in_numpy, "torch": in_torch, "keras": in_keras}[sys.argv[1]]
    print(json.dumps(list(train(demo.digits(epochs=1)))))
