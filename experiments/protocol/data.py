"""Data sets as uint8 images and int32 labels.

They are those of tensorflow-datasets in ArrayRecord, scikit-learn's digits, and a file of NumPy.
"""

import contextlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

# The names of tensorflow-datasets, and the splits to train on and to test on.
_TFDS_SPLITS = {
    "cifar10": ("train", "test"),
    "svhn_cropped": ("train", "test"),
    "imagenette/160px-v2": ("train", "validation"),
}
DATASETS = ("digits", *_TFDS_SPLITS)
# The arrays of a file of NumPy. Keras has the same names.
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_BLOCK = 1000


class Examples(NamedTuple):
    """Labelled images, a pytree with leading axis N.

    Attributes:
        images: uint8 `[N, H, W, C]`.
        labels: int32 `[N]`.
    """

    images: Any
    labels: Any


class Dataset(NamedTuple):
    """A data set in memory.

    Attributes:
        name: the name, with the version.
        description: where the data come from, in the words of those who keep them.
        train: the split from which the images of experts, target and validation are drawn.
        test: the split that is used only for the report.
        num_classes: the number of classes. Labels lie in `range(num_classes)`.
        checksum: the checksum of all images and labels.
    """

    name: str
    description: str
    train: Examples
    test: Examples
    num_classes: int
    checksum: int


class DatasetNotFoundError(RuntimeError):
    """A data set is not prepared, and could not be prepared here."""


class DamagedDatasetError(ValueError):
    """The files of a data set cannot be read, or do not hold what they must hold."""


def load(name: str, data_dir: str | None = None, image_size: int | None = None) -> Dataset:
    """Loads a data set. If it is not prepared, tensorflow-datasets downloads and prepares it first.

    Args:
        name: one of `DATASETS`, or the path of a file `.npz`. Such a file has the arrays `x_train` and `x_test`, uint8
            `[N, H, W, C]` with one or three channels, or `[N, H, W]`. It also has `y_train` and `y_test`, integers
            `[N]` or `[N, 1]`. `y_train` has each class, from 0 on.
        data_dir: tensorflow-datasets' data directory. None is its own default: `TFDS_DATA_DIR`, or
            `~/tensorflow_datasets`.
        image_size: height and width of the images. The largest square in the middle of an image is resized to it. None
            keeps the images as they are.

    Raises:
        ValueError: if the name is unknown, if images differ in size and no `image_size` is given, if the images exceed
            the memory, or if the arrays of a file `.npz` are not as above.
        DatasetNotFoundError: if the data set is not there and cannot be prepared.
        DamagedDatasetError: if a file cannot be read, if a split has no images, or if a label belongs to no class.
    """
    is_file = name.endswith(".npz")
    if name not in DATASETS and not is_file:
        raise ValueError(f"dataset is {name!r}; expected one of {DATASETS}, or the path of a file .npz")
    if name == "digits":
        full_name, description, train, test, num_classes = _digits(image_size)
    elif is_file:
        full_name, description, train, test, num_classes = _npz(Path(name), image_size)
    else:
        full_name, description, train, test, num_classes = _tfds(name, data_dir, image_size)
    for split, examples in (("training", train), ("test", test)):
        _check_labels(full_name, split, examples.labels, num_classes)
    checksum = 0
    for array in (*train, *test):
        checksum = zlib.crc32(array.tobytes(), checksum)
    return Dataset(full_name, description, train, test, num_classes, checksum)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean and the standard deviation of each channel of uint8 images, as fractions, float32 `[C]`."""
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(images.shape[-1])]
    levels = np.arange(256) / 255
    mean = np.array([np.average(levels, weights=count) for count in counts])
    second = np.array([np.average(levels**2, weights=count) for count in counts])
    return mean.astype(np.float32), np.sqrt(second - mean**2).astype(np.float32)


def _digits(image_size: int | None) -> tuple[str, str, Examples, Examples, int]:
    """Returns scikit-learn's 1797 digits of 8 x 8 pixels. Every fourth one is for the test."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    _check_memory("digits", len(labels), image_size or 8, 1)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = np.stack([_resized(image, image_size, 1) for image in images])
    examples = Examples(images, labels.astype(np.int32))
    is_test = np.arange(len(images)) % 4 == 3
    train, test = (Examples(*(array[rows] for array in examples)) for rows in (~is_test, is_test))
    description = (
        "The 1797 handwritten digits that scikit-learn bundles, 8 x 8 pixels; every fourth one is for the test."
    )
    return "digits (scikit-learn)", description, train, test, 10


def _npz(path: Path, image_size: int | None) -> tuple[str, str, Examples, Examples, int]:
    """A file of NumPy."""
    if not path.is_file():
        raise DatasetNotFoundError(f"dataset is {path}, but there is no such file")
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in _ARRAYS if name in file}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise DamagedDatasetError(f"{path} cannot be read ({type(error).__name__}: {first_line})") from error
    if missing := [name for name in _ARRAYS if name not in arrays]:
        raise ValueError(f"{path} has no array {missing[0]}; expected {_ARRAYS}")
    train, test = (_checked_arrays(path, split, arrays, image_size) for split in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(f"{path}: x_train has shape {train.images.shape}, and x_test has {test.images.shape}")
    classes = np.unique(train.labels)
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise ValueError(
            f"{path}: y_train has {len(classes)} different labels, from {classes[0]} to {classes[-1]}; expected each "
            "label from 0 on"
        )
    description = f"The images and labels of the file {path.name}."
    return path.name, description, train, test, len(classes)


def _checked_arrays(path: Path, split: str, arrays: dict[str, np.ndarray], image_size: int | None) -> Examples:
    """Returns the images and labels of one split of a file of NumPy."""
    images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    labels = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise ValueError(
            f"{path}: x_{split} is {images.dtype} of shape {images.shape}; expected uint8, [N, H, W, C] or [N, H, W]"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path}: y_{split} is {labels.dtype} of shape {labels.shape}; expected a whole number for each of the "
            f"{len(images)} images of x_{split}"
        )
    images = images if images.ndim == 4 else images[..., None]
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"{path}: x_{split} has {images.shape[-1]} channels on its last axis; expected 1 or 3")
    if image_size is not None:
        _check_memory(path.name, len(images), image_size, images.shape[-1])
        images = np.stack([_resized(image, image_size, images.shape[-1]) for image in images])
    # A label that int32 cannot hold must not become another label.
    return Examples(images, np.clip(labels.astype(np.int64), -1, 2**31 - 1).astype(np.int32))


def _tfds(name: str, data_dir: str | None, image_size: int | None) -> tuple[str, str, Examples, Examples, int]:
    """A set of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    if data_dir is not None and Path(data_dir).is_file():
        raise DatasetNotFoundError(f"data_dir is {data_dir}, a file; expected a folder")
    with _quiet():
        try:
            builder: Any = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except ValueError as error:
            raise DatasetNotFoundError(
                f"{name} is not kept as ArrayRecord in {data_dir or 'the default data directory'}: {error}.\n"
                "Point --data-dir at another directory to prepare it there as ArrayRecord, which needs no TensorFlow "
                "to read; python -m experiments.digits needs no download."
            ) from error
        except Exception as error:
            # An error of protocol buffers: dataset_info.json or features.json is damaged.
            raise _damaged(f"{name} in {data_dir or 'the default data directory'}", error) from error
        if image_size is None and None in builder.info.features["image"].shape:
            raise ValueError(f"image_size is None, but the images of {name} have sizes of their own; give --image-size")
        if not builder.is_prepared():
            _prepare(builder)
        train, test = (_decode(builder, split, image_size) for split in _TFDS_SPLITS[name])
    # This is the description of the prepared copy. That of `builder.info` comes from the code.
    description = json.loads((builder.data_path / "dataset_info.json").read_text())["description"]
    return builder.info.full_name, description, train, test, builder.info.features["label"].num_classes


def _prepare(builder: Any) -> None:
    """Downloads and prepares a data set, or says what to do instead."""
    directory = builder.data_path.parents[builder.info.full_name.count("/")]
    where = "" if directory.exists() else f" (there is no directory {directory})"
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise DatasetNotFoundError(
            f"{builder.info.full_name} is not prepared: looked for its ArrayRecord files in {builder.data_path}"
            f"{where}, and preparing it there failed ({type(error).__name__}: {error}).\n"
            "To prepare it, install what that needs (pip install -e '.[experiments,prepare]') and run this command "
            "again where the network allows; or point --data-dir (or TFDS_DATA_DIR) at a directory that holds it.\n"
            "python -m experiments.digits needs no download."
        ) from error


def _decode(builder: Any, split: str, image_size: int | None) -> Examples:
    """A whole split as arrays, read in blocks."""
    where = f"split {split!r} of {builder.info.full_name} in {builder.data_path}"
    *sizes, num_channels = builder.info.features["image"].shape
    try:
        source = builder.as_data_source(split=split)
        num_images = len(source)
    except Exception as error:
        raise _damaged(where, error) from error
    if not num_images:
        raise DamagedDatasetError(f"{where} holds no images")
    _check_memory(builder.info.full_name, num_images, image_size or max(sizes), num_channels)
    images, labels = [], []
    for start in range(0, num_images, _BLOCK):
        try:
            for record in source.__getitems__(range(start, min(start + _BLOCK, num_images))):
                images.append(_resized(record["image"], image_size, num_channels))
                labels.append(record["label"])
        except Exception as error:
            raise _damaged(f"{where}, among images {start} to {start + _BLOCK},", error) from error
    if len(shapes := {image.shape for image in images}) > 1:
        raise DamagedDatasetError(f"{where} has images of {len(shapes)} shapes, as {sorted(shapes)[:2]}; expected one")
    return Examples(np.stack(images), np.array(labels, np.int32))


def _damaged(where: str, error: Exception) -> DamagedDatasetError:
    """The error for files that a reader or a decoder failed on."""
    first_line = next(iter(str(error).splitlines()), "")
    return DamagedDatasetError(
        f"{where} cannot be read ({type(error).__name__}: {first_line}); delete that folder, and prepare it again"
    )


def _check_labels(name: str, split: str, labels: np.ndarray, num_classes: int) -> None:
    """Refuses labels of no class, for example -1, which stands for none."""
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        raise DamagedDatasetError(
            f"{name}: label {labels[wrong[0]]} of image {wrong[0]} of the {split} images, one of {wrong.size} such; "
            f"expected labels of 0 to {num_classes - 1}"
        )


def _check_memory(name: str, num_images: int, size: int, num_channels: int) -> None:
    """Refuses images that exceed the memory of this machine."""
    needed = num_images * size**2 * num_channels
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"image_size is {size}: the {num_images} images of {name} would take {needed / 1e9:,.0f} GB, and this "
            f"machine has {there / 1e9:,.0f} GB"
        )


def _resized(image: np.ndarray, size: int | None, num_channels: int) -> np.ndarray:
    """Returns the largest square in the middle of an image, as `[size, size, num_channels]`. The image may be gray."""
    if size is None or image.shape == (size, size, num_channels):
        return image
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    picture = picture.convert("L" if num_channels == 1 else "RGB")
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)).reshape(size, size, num_channels)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps tensorflow-datasets' advice on faster decoders out of a run's output."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
