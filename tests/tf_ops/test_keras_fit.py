"""What a manager hears of keras.Model.fit, and that fit does not notice."""

from __future__ import annotations

import gc
import inspect
import math
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from halfstep.loss_scale_callback import LossScaleCallback
from manager_cases import X, Y, compiled, kept, manager, small

_fit = keras.Model.fit


def test_fit_trains_as_it_would_without() -> None:
    def run(kind: str, wrapped: bool) -> tuple[list[np.ndarray], dict]:
        keras.utils.clear_session()
        keras.utils.set_random_seed(1)
        mp = manager()
        if wrapped:
            mp.setup_tensorflow_policy()
        with mp.policy_context():
            model = keras.Sequential([small(), keras.layers.Dropout(0.5)])
        optimizer = mp.wrap_optimizer(keras.optimizers.Adam(0.01))
        model.compile(optimizer, "mse")
        history = model.fit(*DATA[kind](), epochs=3, shuffle=kind == "arrays", verbose=0, **STEPS.get(kind, {}))
        assert (kept(mp) is not None) == wrapped
        mp.restore_tensorflow_policy()
        logs = {key: values for key, values in history.history.items() if key == "loss"}
        return [*model.get_weights(), optimizer.scale(), optimizer.counters()], logs

    for kind in DATA:
        plain, seen = run(kind, False), run(kind, True)
        assert plain[1] == seen[1], kind
        for a, b in zip(plain[0], seen[0], strict=True):
            assert np.array_equal(a, b), kind


class Items(keras.utils.PyDataset):
    """Batches that are drawn at random as they are read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.random.randint(0, 12, 4)  # noqa: NPY002 - its state is what this is about
        return X[rows], Y[rows]


def batches():
    for start in range(0, 36, 4):
        yield X[start % 12 : start % 12 + 4], Y[start % 12 : start % 12 + 4]


def shuffled() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(12, seed=3).batch(4)


def from_generator() -> tf.data.Dataset:
    spec = tuple(tf.TensorSpec((None, n), "float32") for n in (4, 1))
    return tf.data.Dataset.from_generator(batches, output_signature=spec)


DATA = {
    "arrays": lambda: (X, Y),
    "shuffled dataset": lambda: (shuffled(),),
    "dataset of a generator": lambda: (from_generator(),),
    "generator": lambda: (batches(),),
    "PyDataset": lambda: (Items(),),
}
STEPS = {"dataset of a generator": {"steps_per_epoch": 3}, "generator": {"steps_per_epoch": 3}}


def test_the_first_batch_is_kept() -> None:
    mp = manager("mixed_bfloat16")
    mp.setup_tensorflow_policy()
    model = compiled(mp)
    model.fit(X, Y, batch_size=5, sample_weight=np.arange(12.0), verbose=0)
    x, y, weight = kept(mp)
    assert np.array_equal(x, X[:5])
    assert np.array_equal(y, Y[:5])
    assert np.array_equal(weight, np.arange(5.0))
    assert weight.dtype == np.float32
    assert not np.shares_memory(x, X)
    model.fit(X[::-1], Y, batch_size=5, sample_weight=np.arange(12.0), verbose=0)
    assert kept(mp)[0] is x, "of the same model and data of the same form the first stays"
    model.fit(X, Y, verbose=0)
    assert len(kept(mp)[0]) == 12, "32 rows are the default"
    model.fit(X, Y, steps_per_epoch=2, verbose=0)
    assert len(kept(mp)[0]) == 6
    model.fit(tf.constant(X), y=tf.constant(Y), batch_size=3, validation_split=0.5, verbose=0)
    assert np.array_equal(kept(mp)[0], X[:3])
    model.fit(from_generator(), verbose=0)
    assert np.array_equal(kept(mp)[0], X[:4])
    model.fit(batches(), steps_per_epoch=1, verbose=0)
    assert np.array_equal(kept(mp)[0], X[:4])
    assert isinstance(kept(mp)[0], np.ndarray)


def test_nothing_is_drawn_that_fit_would_not_draw() -> None:
    begun = []

    def counting():
        begun.append(1)
        yield from batches()

    mp = manager("mixed_bfloat16")
    mp.setup_tensorflow_policy()
    model = compiled(mp)
    spec = tuple(tf.TensorSpec((None, n), "float32") for n in (4, 1))
    model.fit(tf.data.Dataset.from_generator(counting, output_signature=spec), epochs=2, verbose=0)
    assert (len(begun), kept(mp) is not None) == (2, True)
    generator = batches()
    compiled(mp).fit(generator, steps_per_epoch=3, verbose=0)
    left = len(list(generator))
    mp.restore_tensorflow_policy()
    generator = batches()
    compiled(mp).fit(generator, steps_per_epoch=3, verbose=0)
    assert left > 0
    assert len(list(generator)) > 0, "Keras reads ahead, so how many are left differs"


def test_data_that_cannot_be_looked_at_is_trained_on_and_said() -> None:
    mp = manager("mixed_bfloat16")
    mp.setup_tensorflow_policy()
    ragged = tf.data.Dataset.from_tensors((tf.ragged.constant([[1.0, 2.0], [3.0]]), tf.constant([[1.0], [2.0]])))
    model = keras.Sequential([keras.layers.Lambda(lambda x: x.to_tensor(shape=(2, 4))), keras.layers.Dense(1)])
    model.compile(mp.wrap_optimizer("sgd"), "mse")
    history = model.fit(ragged, verbose=0)
    assert math.isfinite(history.history["loss"][0])
    note = mp.get_statistics().notes["memory_reduction"]
    assert "dense tensors" in note
    assert "watch(model, x, y)" in note

    class Failing(Items):
        def __getitem__(self, index: int):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        compiled(mp).fit(Failing(), verbose=0)
    assert "item 0 of the Failing raised OSError: the disk is gone" in mp.get_statistics().notes["memory_reduction"]


def test_errors_of_fit_stay_what_they_are() -> None:
    mp = manager("mixed_bfloat16")
    calls = (
        lambda model: model.fit(X, Y, no_such_argument=1),
        lambda model: model.fit(X, Y[:3], verbose=0),
        lambda model: model.fit(None, None),
        lambda model: small().fit(X, Y),
        lambda model: model.fit(X, Y, batch_size="four", verbose=0),
    )
    for call in calls:
        model = compiled(mp)
        with pytest.raises(Exception) as plain:  # noqa: PT011 - whichever it is
            call(model)
        mp.setup_tensorflow_policy()
        with pytest.raises(type(plain.value)) as wrapped:
            call(model)
        mp.restore_tensorflow_policy()
        assert str(wrapped.value).splitlines()[0] == str(plain.value).splitlines()[0]


def test_the_wrapper_looks_like_fit_and_goes_away() -> None:
    signature = inspect.signature(keras.Model.fit)
    mp = manager()
    mp.setup_tensorflow_policy()
    assert (keras.Model.fit.__name__, inspect.signature(keras.Model.fit)) == ("fit", signature)
    assert keras.Model.fit.__doc__ == _fit.__doc__
    ours = keras.Model.fit
    keras.Model.fit = lambda self, *args, **kwargs: ours(self, *args, **kwargs)  # somebody else's, on top
    theirs = keras.Model.fit
    mp.restore_tensorflow_policy()
    assert keras.Model.fit is theirs
    model = compiled(mp)
    model.fit(X, Y, verbose=0)
    assert kept(mp) is None, "what is left of the wrapper hears nothing"
    keras.Model.fit = ours
    mp.setup_tensorflow_policy()
    mp.restore_tensorflow_policy()
    assert keras.Model.fit is _fit
    assert "fit" not in keras.Model.__dict__


def test_subclasses_that_override_fit() -> None:
    class Model(keras.Sequential):
        def fit(self, *args, **kwargs):
            return super().fit(*args, epochs=2, **kwargs), "mine"

    mp = manager()
    mp.setup_tensorflow_policy()
    model = Model([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(mp.wrap_optimizer("sgd"), "mse")
    history, mine = model.fit(X, Y, verbose=0)
    assert mine == "mine"
    assert len(history.history["loss_scale"]) == 2
    assert np.array_equal(kept(mp)[0], X)


def test_a_model_is_not_kept_alive() -> None:
    mp = manager("mixed_bfloat16")
    mp.setup_tensorflow_policy()
    model = compiled(mp)
    model.fit(X, Y, verbose=0)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert mp.get_statistics().notes["memory_reduction"] == "the model is gone"


def test_callbacks_of_all_forms_are_kept_and_ours_comes_first() -> None:
    seen = []

    class Probe(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(sorted(logs))

    mp = manager()
    mp.setup_tensorflow_policy()
    model = compiled(mp)
    given = [Probe()]
    for callbacks in (given, given[0], [[given[0]]], (given[0],)):
        model.fit(X, Y, verbose=0, callbacks=callbacks)
    assert len(given) == 1, "the user's list is not changed"
    assert seen == [["gradient_norm", "loss", "loss_scale", "skipped_steps"]] * 4
    own = keras.callbacks.CallbackList(given, add_history=True, model=model, epochs=1)
    model.fit(X, Y, verbose=0, callbacks=own)
    assert seen[-1] == seen[0]
    assert not any(isinstance(callback, LossScaleCallback) for callback in own.callbacks)
    model.fit(X, Y, verbose=0, callbacks=[*given, LossScaleCallback()])
    assert seen[-1] == ["loss"], "the user's own stays where it is, and no second one is added"
