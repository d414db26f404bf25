import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from experiments import data


def write_tfds(data_dir, name, sizes, picture=lambda index: np.full((32, 32, 3), index % 256, np.uint8)):
    """A small set in the format of tensorflow-datasets: image i is of the one colour i, and of the class i mod 10."""
    builder: Any = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
    folder = pathlib.Path(builder.data_path)
    folder.mkdir(parents=True)
    splits = []
    for split, size in sizes.items():
        path = folder / f"{builder.name.split('/')[0]}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for index in range(size):
            png = io.BytesIO()
            Image.fromarray(picture(index)).save(png, "PNG")
            png.seek(0)
            example = {"image": png, "label": index % 10, "id": str(index)}
            features = builder.info.features
            writer.write(features.serialize_example(features.encode_example({key: example[key] for key in features})))
        writer.close()
        template: Any = tfds.core.ShardedFileTemplate(
            dataset_name=builder.name, data_dir=epath.Path(folder), split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[size], num_bytes=path.stat().st_size, filename_template=template
            )
        )
    builder.info.set_splits(tfds.core.SplitDict(splits))
    builder.info.write_to_directory(folder)
    return folder


def test_a_prepared_set_is_read_whole_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_BLOCK", 10)
    write_tfds(tmp_path, "cifar10", {"train": 25, "test": 7})
    dataset = data.load("cifar10", str(tmp_path))
    assert dataset.name == "cifar10/3.0.2"
    assert dataset.num_classes == 10
    assert dataset.train.images.shape == (25, 32, 32, 3)
    assert dataset.train.images.dtype == np.uint8
    np.testing.assert_array_equal(dataset.train.images[:, 0, 0, 0], np.arange(25))
    np.testing.assert_array_equal(dataset.test.labels, np.arange(7))
    assert dataset.test.labels.dtype == np.int32


def test_svhn_is_read_as_its_train_and_test_splits(tmp_path):
    write_tfds(tmp_path, "svhn_cropped", {"train": 12, "test": 5, "extra": 2})
    svhn = data.load("svhn_cropped", str(tmp_path))
    assert svhn.name.startswith("svhn_cropped/")
    assert (svhn.train.images.shape, svhn.test.images.shape) == ((12, 32, 32, 3), (5, 32, 32, 3))
    assert svhn.num_classes == 10
    np.testing.assert_array_equal(svhn.train.labels, np.arange(12) % 10)


def _picture(index):
    """Of any shape: wide, tall and gray; its middle square is of one color, the rest black."""
    if index % 3 == 2:
        return np.full((20, 20), index, np.uint8)
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = index
    return wide if index % 3 == 0 else wide.swapaxes(0, 1)


def test_images_of_any_size_are_cropped_to_the_middle_square_and_resized(tmp_path):
    write_tfds(tmp_path, "imagenette/160px-v2", {"train": 9, "validation": 4}, _picture)
    imagenette = data.load("imagenette/160px-v2", str(tmp_path), 10)
    assert (imagenette.train.images.shape, imagenette.test.images.shape) == ((9, 10, 10, 3), (4, 10, 10, 3))
    assert imagenette.train.images.dtype == np.uint8
    expected = np.broadcast_to(np.arange(9)[:, None, None, None], (9, 10, 10, 3))
    np.testing.assert_array_equal(imagenette.train.images, expected)


def test_images_of_many_sizes_need_a_size(tmp_path):
    with pytest.raises(ValueError, match="image_size is None, but the images of imagenette/160px-v2 have sizes"):
        data.load("imagenette/160px-v2", str(tmp_path))


def test_the_digits_can_be_resized_too():
    assert data.load("digits", image_size=16).train.images.shape[1:] == (16, 16, 1)


def test_the_default_directory_is_that_of_tensorflow_datasets(tmp_path, monkeypatch):
    write_tfds(tmp_path, "cifar10", {"train": 3, "test": 2})
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(data.load("cifar10").train.labels) == 3


def test_a_set_that_is_not_there_is_prepared(tmp_path, monkeypatch):
    def prepare(builder):
        write_tfds(tmp_path, "cifar10", {"train": 4, "test": 2})
        builder.info.read_from_directory(builder.data_path)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    assert len(data.load("cifar10", str(tmp_path)).train.labels) == 4


def test_a_set_that_cannot_be_prepared_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    def prepare(builder):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    with pytest.raises(data.DatasetNotFoundError) as caught:
        data.load("cifar10", str(tmp_path))
    for part in (str(tmp_path), "cifar10/3.0.2", "no route to host", "prepare", "--data-dir", "experiments.digits"):
        assert part in str(caught.value)
    assert "there is no directory" not in str(caught.value)
    with pytest.raises(data.DatasetNotFoundError, match=rf"\(there is no directory {tmp_path / 'mistyped'}\)"):
        data.load("cifar10", str(tmp_path / "mistyped"))


def test_a_set_in_another_format_is_refused_with_the_way_out(tmp_path):
    folder = write_tfds(tmp_path, "cifar10", {"train": 3, "test": 2})
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(data.DatasetNotFoundError, match="not kept as ArrayRecord"):
        data.load("cifar10", str(tmp_path))


def test_the_description_is_that_of_the_prepared_copy(tmp_path):
    folder = write_tfds(tmp_path, "cifar10", {"train": 3, "test": 2})
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"description": "a lossy copy"}))
    assert data.load("cifar10", str(tmp_path)).description == "a lossy copy"


def test_an_unknown_set_is_refused_with_those_known():
    with pytest.raises(ValueError, match=r"dataset is 'mnist'.*digits"):
        data.load("mnist")


def test_the_digits_are_bundled_and_split_apart():
    digits = data.load("digits")
    assert len(digits.train.labels) + len(digits.test.labels) == 1797
    assert digits.train.images.shape[1:] == (8, 8, 1)
    assert digits.train.images.max() == 255
    assert set(digits.test.labels) == set(range(10))


def test_channel_statistics_are_the_mean_and_standard_deviation_of_each_channel():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-5)
