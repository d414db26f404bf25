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

from experiments.protocol import data


def _plain(index):
    return np.full((32, 32, 3), index % 256, np.uint8)


def write_tfds(data_dir, name, sizes, picture=_plain, label=lambda index: index % 10):
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
            drawn = picture(index)
            png.write(drawn) if isinstance(drawn, bytes) else Image.fromarray(drawn).save(png, "PNG")
            png.seek(0)
            example = {"image": png, "label": label(index), "id": str(index)}
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


def damaged_records(folder, content):
    path = next(folder.glob("*-train.array_record-*"))
    content = content(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)


def flipped(content):
    return bytes(
        byte ^ 0xFF if len(content) // 3 < at < len(content) // 3 + 200 else byte for at, byte in enumerate(content)
    )


def noisy(index):
    return np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)


@pytest.mark.parametrize("content", [lambda content: content[:-5000], lambda _: b"", lambda _: None, flipped])
def test_records_that_cannot_be_read_are_named_by_set_split_and_folder(tmp_path, content):
    folder = write_tfds(tmp_path, "cifar10", {"train": 60, "test": 7}, noisy)
    damaged_records(folder, content)
    with pytest.raises(data.DamagedDatasetError) as caught:
        data.load("cifar10", str(tmp_path))
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    for part in ("split 'train' of cifar10/3.0.2", str(folder), "cannot be read", "prepare it again"):
        assert part in said


def test_more_records_in_the_description_than_in_the_files_are_damage(tmp_path):
    folder = write_tfds(tmp_path, "cifar10", {"train": 25, "test": 7})
    path = folder / "dataset_info.json"
    path.write_text(path.read_text().replace('"25"', '"26"'))
    with pytest.raises(data.DamagedDatasetError, match=r"split 'train' .*, among images 0 to 1000, cannot be read"):
        data.load("cifar10", str(tmp_path))


def test_a_description_that_was_cut_is_damage(tmp_path):
    folder = write_tfds(tmp_path, "cifar10", {"train": 5, "test": 3})
    path = folder / "dataset_info.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(data.DamagedDatasetError, match=rf"cifar10 in {tmp_path} cannot be read"):
        data.load("cifar10", str(tmp_path))


def test_a_split_that_is_missing_or_empty_is_named(tmp_path):
    write_tfds(tmp_path / "missing", "cifar10", {"train": 5})
    with pytest.raises(data.DamagedDatasetError, match=r"split 'test' of cifar10.*Unknown split"):
        data.load("cifar10", str(tmp_path / "missing"))
    write_tfds(tmp_path / "empty", "cifar10", {"train": 5, "test": 0})
    with pytest.raises(data.DamagedDatasetError, match="split 'test' of cifar10"):
        data.load("cifar10", str(tmp_path / "empty"))


def test_images_that_are_none_are_damage(tmp_path):
    write_tfds(tmp_path, "imagenette/160px-v2", {"train": 5, "validation": 3}, lambda index: b"no picture")
    with pytest.raises(data.DamagedDatasetError, match=r"split 'train' of imagenette.*UnidentifiedImageError"):
        data.load("imagenette/160px-v2", str(tmp_path), 10)


def test_images_of_several_shapes_where_all_must_have_one_are_damage(tmp_path):
    write_tfds(tmp_path, "cifar10", {"train": 5, "test": 3}, lambda index: np.zeros((32, 32 + index, 3), np.uint8))
    with pytest.raises(data.DamagedDatasetError, match=r"split 'train' of cifar10"):
        data.load("cifar10", str(tmp_path))


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_of_no_class_are_named_before_any_work(tmp_path, split):
    sizes = {"train": 12, "test": 12}
    seen = []

    def label(index):
        seen.append(index)
        in_split = (len(seen) <= 12) == (split == "train")
        return -1 if in_split and index == 3 else index % 10

    write_tfds(tmp_path, "cifar10", sizes, label=label)
    word = {"train": "training", "test": "test"}[split]
    with pytest.raises(data.DamagedDatasetError, match=rf"cifar10/3.0.2: label -1 of image 3 of the {word} images"):
        data.load("cifar10", str(tmp_path))


def test_labels_above_the_classes_are_refused():
    with pytest.raises(
        data.DamagedDatasetError, match=r"x: label 37 of image 1 .* one of 2 such; expected labels of 0 to 9"
    ):
        data._check_labels("x", "test", np.array([9, 37, 10]), 10)


def test_a_size_that_no_memory_holds_is_refused_before_it_is_allocated(tmp_path):
    with pytest.raises(ValueError, match="image_size is 100000: the 1797 images of digits would take"):
        data.load("digits", image_size=100_000)
    write_tfds(tmp_path, "imagenette/160px-v2", {"train": 9, "validation": 4}, _picture)
    with pytest.raises(ValueError, match="image_size is 1000000: the 9 images of imagenette"):
        data.load("imagenette/160px-v2", str(tmp_path), 1_000_000)


def test_a_data_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(data.DatasetNotFoundError, match=r"data_dir is .*file, a file; expected a folder"):
        data.load("cifar10", str(tmp_path / "file"))


def _arrays(**changes):
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (12, 6, 6, 3), np.uint8),
        "y_train": np.arange(12)[:, None] % 4,
        "x_test": random.integers(0, 256, (5, 6, 6, 3), np.uint8),
        "y_test": np.arange(5) % 4,
    } | changes


def _saved(folder, arrays):
    np.savez(folder / "mine.npz", **arrays)
    return str(folder / "mine.npz")


def test_a_file_of_numpy_is_a_data_set(tmp_path):
    arrays = _arrays()
    dataset = data.load(_saved(tmp_path, arrays))
    assert (dataset.name, dataset.num_classes) == ("mine.npz", 4)
    np.testing.assert_array_equal(dataset.train.images, arrays["x_train"])
    np.testing.assert_array_equal(dataset.train.labels, np.arange(12) % 4)
    np.testing.assert_array_equal(dataset.test.labels, arrays["y_test"])
    assert dataset.train.labels.dtype == np.int32


def test_the_images_of_a_file_may_be_gray_and_are_resized(tmp_path):
    gray = {name: _arrays()[name][..., 0] for name in ("x_train", "x_test")}
    path = _saved(tmp_path, _arrays(**gray))
    assert data.load(path).train.images.shape == (12, 6, 6, 1)
    assert data.load(path, image_size=3).test.images.shape == (5, 3, 3, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((12, 6, 6, 3))}, r"x_train is float64 of shape \(12, 6, 6, 3\); expected uint8"),
        (
            {"x_test": np.zeros((5, 36), np.uint8)},
            r"x_test is uint8 of shape \(5, 36\); expected uint8, \[N, H, W, C\]",
        ),
        ({"x_test": np.zeros((5, 7, 7, 3), np.uint8)}, r"x_train has shape .* x_test has \(5, 7, 7, 3\)"),
        (
            {"y_train": np.zeros(11, int)},
            r"y_train is int64 of shape \(11,\); expected a whole number for each of the 12",
        ),
        ({"y_test": np.eye(5)}, r"y_test is float64 of shape \(5, 5\); expected a whole number for each of the 5"),
        # PyTorch's layout, MATLAB's labels, and a label that int32 cannot hold.
        ({"x_train": np.zeros((12, 3, 6, 6), np.uint8)}, "x_train has 6 channels on its last axis; expected 1 or 3"),
        ({"y_train": 1 + np.arange(12) % 4}, "y_train has 4 different labels, from 1 to 4; expected each label from 0"),
        ({"y_train": np.arange(12) % 2 * 5}, "y_train has 2 different labels, from 0 to 5; expected each label from 0"),
        ({"y_test": np.full(5, 2**32)}, "label 2147483647 of image 0 of the test images"),
        ({"y_test": np.full(5, 4)}, "label 4 of image 0 of the test images, one of 5 such; expected labels of 0 to 3"),
        ({"y_train": np.array([None] * 12)}, "cannot be read"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        data.load(_saved(tmp_path, _arrays(**changes)))


def test_a_file_that_is_missing_damaged_or_incomplete_is_named(tmp_path):
    with pytest.raises(data.DatasetNotFoundError, match=r"none\.npz, but there is no such file"):
        data.load(str(tmp_path / "none.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(data.DamagedDatasetError, match=r"text\.npz cannot be read"):
        data.load(str(tmp_path / "text.npz"))
    arrays = _arrays()
    del arrays["y_test"]
    with pytest.raises(ValueError, match="has no array y_test; expected"):
        data.load(_saved(tmp_path, arrays))
