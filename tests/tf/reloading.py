"""A child process: loads each model in a folder, trains it on, and saves it.

Of portopt it imports the package, and nothing more.
"""

import sys
from pathlib import Path

import keras
import numpy as np

import portopt_tf  # noqa: F401 (registers its classes)

folder = Path(sys.argv[1])
data = np.load(folder / "data.npz")
for path in folder.glob("*.keras"):
    model = keras.models.load_model(path)
    model.run_eagerly = True
    model.train_on_batch(data["x"], data["y"])
    model.save(path)
