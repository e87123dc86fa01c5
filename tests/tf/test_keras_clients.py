"""Tools around Keras, with ours in the native's place: the same losses."""

import keras
import pytest
from keras_runs import data, small_model
from support import assert_agree

import portopt_tf

MODULES = (keras.optimizers, portopt_tf)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("double")]


def compiled(optimizer):
    model = small_model()
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


# KerasTuner still calls these.
@pytest.mark.filterwarnings(r"ignore:(currentThread|getName)\(\) is deprecated:DeprecationWarning")
def test_keras_tuner_finds_the_same_learning_rate(tmp_path):
    tuner = pytest.importorskip("keras_tuner", reason="KerasTuner is not installed")
    pytest.importorskip("tensorboard", reason="KerasTuner imports TensorBoard, not installed")
    results = []
    for module in MODULES:

        def build(hp, module=module):
            return compiled(module.Adam(hp.Float("rate", 1e-3, 1.0, sampling="log")))

        search = tuner.RandomSearch(
            build,
            tuner.Objective("loss", "min"),
            max_trials=2,
            seed=1,  # 0 would be none
            directory=tmp_path / module.__name__,
        )
        search.search(*data(), batch_size=24, shuffle=False, verbose=0)
        trials = search.oracle.get_best_trials(2)
        results.append([[t.hyperparameters.values["rate"], t.score] for t in trials])
    assert len({rate for rate, _ in results[0]}) == 2
    assert_agree(results[1], results[0], "float64")


def test_optuna_finds_the_same_learning_rate():
    optuna = pytest.importorskip("optuna", reason="Optuna is not installed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    results = []
    for module in MODULES:

        def objective(trial, module=module):
            rate = trial.suggest_float("rate", 1e-3, 1.0, log=True)
            name = trial.suggest_categorical("name", ("Adam", "SGD", "RMSprop"))
            model = compiled(getattr(module, name)(rate))
            return model.fit(*data(), batch_size=8, shuffle=False, verbose=0).history["loss"][-1]

        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        study.optimize(objective, n_trials=6)
        results.append([[t.params["rate"], t.value] for t in study.trials])
    assert_agree(results[1], results[0], "float64")
