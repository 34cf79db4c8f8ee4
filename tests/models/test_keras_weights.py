"""Loading Keras' files into chains, saving chains for Keras, and what is refused."""

import collections
import functools
import pickle
import random
import zipfile

import finite
import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from fuzz import attempt, damaged, tries
from keras.src.legacy.saving import legacy_h5_format
from models import keras_models
from models.keras_models import MINI

from sfl_jax import models
from sfl_jax.errors import BadInput
from sfl_jax.models import keras_files, keras_weights
from sfl_jax.models.keras_weights import CENTRED, IMAGENET, SIGNED

# Keras on JAX raises this warning when it reads its own variables.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FORMATS = ["mini.weights.h5", "mini.keras", "whole.h5", "weights.h5"]


@functools.cache
def model(**options):
    return keras_models.make(MINI, **options)


def chain_of(channels=3, classes=10, name=MINI):
    with keras_models.mini_variant():
        chain = models.create(name, classes, channels, layer_form="conv", drop_rate_scale=0)
    return chain, chain.init(jax.random.key(0), jnp.zeros((1, 32, 32, channels)))


def write(directory, name, keras_model):
    path = str(directory / name)
    if name == "weights.h5":  # the format of Keras 2 and of the ImageNet weights
        with h5py.File(path, "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, keras_model)
    elif name.endswith(".weights.h5"):
        keras_model.save_weights(path)
    else:
        keras_model.save(path)
    return path


@pytest.fixture
def apart():
    """A separate process reads a file first, as in real use."""


@pytest.fixture(autouse=True)
def not_apart(request, monkeypatch):
    """Tests of sound files skip the separate process, which takes time."""
    if "apart" not in request.fixturenames:
        monkeypatch.setattr(keras_files, "_try_to_read", lambda path: None)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def logits(chain, variables, images):
    return chain.apply(variables, images)[0]


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_what_the_live_model_holds(tmp_path, name):
    chain, fresh = chain_of()
    live = keras_weights.load(model(), MINI, chain, fresh)
    loaded = keras_weights.load(write(tmp_path, name, model()), MINI, chain, fresh)
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(fresh)
    assert_same(loaded.variables, live.variables)
    for old, new in zip(jax.tree.leaves(fresh), jax.tree.leaves(loaded.variables), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        assert not finite.are_equal(old, new)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({"include_preprocessing": False}, SIGNED),
        ({"include_preprocessing": True}, CENTRED),
        ({"include_preprocessing": True, "name": "efficientnetv2-b9"}, IMAGENET),
    ],
)
def test_the_scaling_is_that_of_the_model_in_the_file(tmp_path, name, options, scaling):
    chain, fresh = chain_of()
    path = write(tmp_path, name, model(**options))
    if (name, scaling) == ("weights.h5", SIGNED):
        scaling = CENTRED  # the list of layers in weights alone proves nothing: the variant decides
    assert keras_weights.load(path, MINI, chain, fresh).scaling == scaling


@pytest.mark.parametrize(
    ("scaling", "name"), [(SIGNED, None), (CENTRED, "mini"), (IMAGENET, "efficientnetv2-b9")]
)
def test_scalings_are_those_of_keras_layers(scaling, name):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3)).astype(np.float32)
    ours = pixels / np.asarray(scaling.divisor) + np.asarray(scaling.offset)
    theirs = pixels / 127.5 - 1
    if name is not None:
        whole = model(include_preprocessing=True, name=name)
        theirs = pixels
        for layer in whole.layers:
            if isinstance(layer, keras.layers.Rescaling | keras.layers.Normalization):
                theirs = layer(theirs)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_published_scalings():
    for name in models.VARIANTS:
        of_b = name.removeprefix("efficientnetv2-") in ("b0", "b1", "b2", "b3")
        assert keras_weights.published_scaling(name) == (IMAGENET if of_b else CENTRED)


@pytest.mark.parametrize("scaling", [SIGNED, CENTRED, IMAGENET])
def test_what_a_chain_exports_keras_loads_and_computes_the_same(tmp_path, scaling):
    chain, fresh = chain_of()
    rng = np.random.default_rng(4)
    trained = jax.tree.map(lambda x: x + rng.uniform(0, 0.1, x.shape).astype(x.dtype), fresh)
    path = str(tmp_path / "trained.weights.h5")
    keras_weights.save(path, chain, trained, scaling)
    reread = keras_weights.load(path, MINI, chain, fresh)
    assert_same(reread.variables, trained)
    assert reread.scaling == scaling
    options = {"include_preprocessing": scaling != SIGNED}
    options |= {"name": "efficientnetv2-b9"} if scaling == IMAGENET else {}
    other = keras_models.make(MINI, **options)
    other.load_weights(path)
    pixels, _ = keras_models.batch(32)
    images = pixels / jnp.asarray(scaling.divisor) + jnp.asarray(scaling.offset)
    theirs = keras_models.inference(other, images if scaling == SIGNED else pixels)
    ours = logits(chain, trained, images)
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
    assert np.linalg.norm(logits(chain, fresh, images) - theirs) > 0.1 * np.linalg.norm(theirs)


@pytest.mark.parametrize("form", ["live", "mini.weights.h5", "weights.h5"])
def test_other_classes_get_a_fresh_classifier_and_keep_the_rest(tmp_path, form):
    chain, fresh = chain_of(classes=7)
    source = model() if form == "live" else write(tmp_path, form, model())
    loaded = keras_weights.load(source, MINI, chain, fresh).variables
    assert_same(loaded.params[-1], fresh.params[-1])
    whole, of_whole = chain_of()
    front, _ = whole.split_variables(
        keras_weights.load(model(), MINI, whole, of_whole).variables, len(whole) - 1
    )
    assert_same(chain.split_variables(loaded, len(chain) - 1)[0], front)


def test_a_file_without_a_classifier_gets_a_fresh_one(tmp_path):
    chain, fresh = chain_of()
    headless = keras_models.make(MINI, include_top=False, pooling="avg")
    loaded = keras_weights.load(write(tmp_path, "mini.weights.h5", headless), MINI, chain, fresh).variables
    assert_same(loaded.params[-1], fresh.params[-1])
    assert not finite.are_equal(loaded.params[0]["conv"]["kernel"], fresh.params[0]["conv"]["kernel"])


@pytest.mark.parametrize("options", [{}, {"include_preprocessing": True}])
def test_grey_images_are_colour_images_of_equal_channels(options):
    """For scalings that are equal in all channels."""
    grey, fresh = chain_of(channels=1)
    loaded = keras_weights.load(model(**options), MINI, grey, fresh)
    pixels, _ = keras_models.batch(32, channels=1)
    (divisor,), (offset,) = loaded.scaling
    images = pixels / divisor + offset
    colour = np.repeat(pixels if options else images, 3, axis=-1)
    expected = keras_models.inference(model(**options), jnp.asarray(colour))
    found = logits(grey, loaded.variables, images)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    stem = loaded.variables.params[0]
    third = {**stem, "conv": {"kernel": stem["conv"]["kernel"] / 3}}
    mutated = loaded.variables._replace(params=(third, *loaded.variables.params[1:]))
    assert np.linalg.norm(logits(grey, mutated, images) - expected) > 1e-2 * np.linalg.norm(expected)


def test_grey_images_under_imagenet_scaling_are_exact_inside_the_image():
    colour, of_colour = chain_of()
    grey, of_grey = chain_of(channels=1)
    source = model(include_preprocessing=True, name="efficientnetv2-b9")
    loaded, from_grey = (
        keras_weights.load(source, MINI, c, v) for c, v in [(colour, of_colour), (grey, of_grey)]
    )
    assert (loaded.scaling, from_grey.scaling) == (IMAGENET, CENTRED)
    pixels, _ = keras_models.batch(33, channels=1)
    stems = []
    for chain, (variables, (divisor, offset), _) in [(colour, loaded), (grey, from_grey)]:
        images = jnp.repeat(pixels, len(divisor), -1) / jnp.asarray(divisor) + jnp.asarray(offset)
        stems.append(chain.split(1)[0].apply(chain.split_variables(variables, 1)[0], images)[0])
    expected, found = stems
    np.testing.assert_allclose(found[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-4)
    assert not finite.are_close(found, expected, atol=1e-3)  # the padding has another grey


NESTED = ["n.weights.h5", "n.keras", "n.h5", "weights.h5", "live"]


def nested(*behind, before=(), **options):
    """(a network, a model that holds it as one of its layers); random variables."""
    inner = keras_models.make(MINI, include_preprocessing=True, name="efficientnetv2-b9", **options)
    outer = keras.Sequential([*before, inner, *behind])
    outer.build((None, 32, 32, 3))
    return inner, outer


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_model_inside_a_model_is_found_with_the_classifier_behind_it(tmp_path):
    inner, outer = nested(keras.layers.Dropout(0.2), keras.layers.Dense(10), include_top=False, pooling="avg")
    keras_models.randomise(outer, seed=1)
    chain, fresh = chain_of()
    headless = keras_weights.load(inner, MINI, chain, fresh)
    assert headless.classes is None
    kernel, bias = outer.layers[-1].get_weights()
    for name in NESTED:
        source = outer if name == "live" else write(tmp_path, name, outer)
        variables, scaling, classes = keras_weights.load(source, MINI, chain, fresh)
        assert classes == 10
        # An .h5 with weights alone does not say how an inner model scales its images.
        assert scaling == (CENTRED if name == "weights.h5" else IMAGENET)
        assert_same(variables.params[:-1], headless.variables.params[:-1])
        assert_same(variables.batch_stats, headless.variables.batch_stats)
        np.testing.assert_array_equal(variables.params[-1]["dense"]["dense_kernel"], kernel)
        np.testing.assert_array_equal(variables.params[-1]["dense"]["bias"], bias)


def test_a_whole_network_inside_a_model_keeps_its_own_classifier(tmp_path):
    inner, outer = nested(keras.layers.Softmax())
    expected = keras_weights.load(inner, MINI, *chain_of())
    found = keras_weights.load(write(tmp_path, "n.weights.h5", outer), MINI, *chain_of())
    assert_same(found, expected)
    assert found.classes == 10


AROUND = {  # message: a model with something around its inner model
    "variables outside the inner one, of dense": lambda: nested(keras.layers.Dense(10, name="dense")),
    "variables outside the inner one, of dense, dense_1": lambda: nested(
        keras.layers.Dense(20, name="dense"), keras.layers.Dense(10, name="dense_1"),
        include_top=False, pooling="avg"),
    "a layer outside the inner one that scales images":
        lambda: nested(before=[keras.layers.Rescaling(1 / 255)]),
}  # fmt: skip


@pytest.mark.parametrize("said", AROUND)
def test_what_changes_the_model_inside_a_model_is_refused(tmp_path, said):
    _, outer = AROUND[said]()
    for source in (outer, write(tmp_path, "n.weights.h5", outer)):
        with pytest.raises(BadInput, match=f": holds a model inside a model, with {said}; save the inner"):
            keras_weights.load(source, MINI, *chain_of())


def test_two_models_inside_a_model_are_refused():
    two = [keras_files.Stored({"conv2d": [np.zeros(1)]}, True, True)] * 2
    with pytest.raises(BadInput, match=r"^here: holds a model inside a model, with 2 inner models; save"):
        keras_files.within(keras_files.Stored({}, True, True), two, "here")
    for name in ("rescaling", "normalization_1"):
        with pytest.raises(BadInput, match="outside the inner one that scales images"):
            keras_files.within(keras_files.Stored({name: []}, True, True), two[:1], "here")
    augmentation = keras_files.Stored({"random_flip": []}, True, True)
    assert keras_files.within(two[0], [augmentation], "here") is two[0]


def _delete(file, name):
    del file[name]


def _replace(file, name, value):
    del file[name]
    file[name] = value


STEM = "layers/conv2d/vars/0"
BROKEN = {  # message: a change of a .weights.h5
    "no stem_conv/kernel; ": lambda file: _delete(file, STEM),
    "no stem_bn/moving_variance; ": lambda file: _delete(file, "layers/batch_normalization/vars/3"),
    "no block2a_expand_bn/gamma; ": lambda file: _delete(file, "layers/batch_normalization_2"),
    r"stem_conv/kernel has shape \(3, 3, 3, 9\); efficientnetv2-mini needs \(3, 3, 3, 8\)":
        lambda file: _replace(file, STEM, np.zeros((3, 3, 3, 9), np.float32)),
    "stem_conv/kernel holds int32; it must hold floats":
        lambda file: _replace(file, STEM, np.zeros((3, 3, 3, 8), np.int32)),
    "stem_conv/kernel holds numbers that are not finite":
        lambda file: _replace(file, STEM, np.full((3, 3, 3, 8), np.nan, np.float32)),
    "predictions/bias has shape":
        lambda file: _replace(file, "layers/dense/vars/1", np.zeros(9, np.float32)),
    "predictions/kernel has shape": # other classes and other features
        lambda file: _replace(file, "layers/dense/vars/0", np.zeros((640, 7), np.float32)),
    "stem_conv holds 2 variables; efficientnetv2-mini has 1":
        lambda file: file.create_dataset("layers/conv2d/vars/1", data=np.zeros(8)),
    "conv2d_99 holds 1 variables; efficientnetv2-mini has 0":
        lambda file: file.create_dataset("layers/conv2d_99/vars/0", data=np.zeros(8)),
    "stem_conv/kernel holds numbers that are not finit.": # in float32
        lambda file: _replace(file, STEM, np.full((3, 3, 3, 8), 1e39)),
    "stem_bn/moving_variance holds negative numbers":
        lambda file: _replace(file, "layers/batch_normalization/vars/3", np.full(8, -1.0, np.float32)),
    "without layers": lambda file: _delete(file, "layers"),
}  # fmt: skip


@pytest.mark.parametrize("line", BROKEN)
def test_a_file_that_does_not_fit_is_refused_in_one_line_that_names_the_variable(tmp_path, line):
    path = write(tmp_path, "mini.weights.h5", model())
    with h5py.File(path, "r+") as file:
        BROKEN[line](file)
    refused(path, line)


def refused(path, line):
    chain, fresh = chain_of()
    with pytest.raises(BadInput, match=line) as error:
        keras_weights.load(path, MINI, chain, fresh)
    assert str(error.value).startswith(f"init_from={path}: ")
    assert "\n" not in str(error.value)


def test_files_that_are_no_weights_are_refused(tmp_path, apart):
    refused(str(tmp_path / "absent.h5"), "no such file")
    refused(str(tmp_path), "no such file")
    whole = write(tmp_path, "mini.weights.h5", model())
    for name, content in {"text.h5": b"weights", "empty.h5": b"", "pickle.h5": b"\x80\x04]\x94."}.items():
        (tmp_path / name).write_bytes(content)
        refused(str(tmp_path / name), "not a weights file that Keras wrote")
    with open(whole, "rb") as file:
        (tmp_path / "half.weights.h5").write_bytes(file.read()[:100_000])
    refused(str(tmp_path / "half.weights.h5"), "not a weights file that Keras wrote")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    refused(str(tmp_path / "other.keras"), "not a weights file that Keras wrote")


def test_another_variant_is_refused(tmp_path):
    """In both directions, for two variants that share many layers."""
    path = write(tmp_path, "mini.weights.h5", model())
    for name, variable in [
        ("efficientnetv2-b0", "stem_conv/kernel"),
        ("efficientnetv2-tiny", "top_conv/kernel"),
    ]:
        chain, fresh = chain_of(name=name)
        with pytest.raises(BadInput, match=rf"{variable} has shape .*; {name} needs"):
            keras_weights.load(path, name, chain, fresh)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_damaged_file_is_refused_or_its_other_numbers_are_few(tmp_path, monkeypatch, apart):
    """HDF5 has no checksums, so changed numbers are read as they are. A .keras archive has checksums."""
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("unpickled"))
    monkeypatch.setattr(keras_files, "PATIENCE_S", 5.0)
    chain, fresh = chain_of()
    contents = {name: (tmp_path / write(tmp_path, name, model())).read_bytes() for name in FORMATS}
    right = {name: keras_weights.load(str(tmp_path / name), MINI, chain, fresh) for name in FORMATS}
    rng, outcomes, spoilt = random.Random(6), collections.Counter(), tmp_path / "spoilt"
    for _ in tries(300, 40, "weights files"):
        name = rng.choice(FORMATS)
        spoilt.write_bytes(damaged(rng, contents[name]))
        found, said = attempt(keras_weights.load, str(spoilt), MINI, chain, fresh)
        if found is None:
            assert said.startswith(f"init_from={spoilt}: ")
            outcomes["refused"] += 1
            continue
        assert jax.tree.structure(found.variables) == jax.tree.structure(fresh)
        differ = 0
        for a, b in zip(
            jax.tree.leaves(found.variables), jax.tree.leaves(right[name].variables), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert np.isfinite(a).all()
            differ += int((np.asarray(a) != np.asarray(b)).sum())
        outcomes["other numbers" if differ else "the same"] += 1
        assert not differ or name != "mini.keras"
    print(outcomes)
    assert len(outcomes) == 3


@pytest.mark.parametrize(
    ("program", "line"),
    [("while True: pass", "damaged: reading it does not end"),
     ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "damaged: reading it crashes")],
)  # fmt: skip
def test_a_file_that_keeps_or_crashes_the_library_is_refused(program, line, tmp_path, monkeypatch, apart):
    """HDF5 does both with some damaged attributes."""
    path = write(tmp_path, "weights.h5", model())
    monkeypatch.setattr(keras_files, "READ_ALL", program)
    monkeypatch.setattr(keras_files, "PATIENCE_S", 1.0)
    with pytest.raises(BadInput, match=line):
        keras_weights.load(path, MINI, *chain_of())
