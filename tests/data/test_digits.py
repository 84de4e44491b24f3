"""The embedded digits: the split, the pictures, and the way back to 8x8."""

import numpy as np
import pytest

from dit_jax.data import digits


def test_split_is_complete_disjoint_and_stratified():
    (train, train_labels), (test, test_labels) = map(digits.load_originals, ("train", "test"))
    assert (len(train), len(test)) == (1433, 364)
    counts = np.bincount(train_labels) + np.bincount(test_labels)
    np.testing.assert_array_equal(np.bincount(test_labels), np.ceil(counts / 5))
    from sklearn.datasets import load_digits

    everything = np.sort(load_digits().data, axis=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test]), axis=0), everything)


def test_pictures_hold_the_ink_of_the_real_images():
    features, labels = digits.load_originals("test")
    images, same_labels = digits.load_digits("test")
    assert images.shape == (364, 32, 32, 3)
    assert images.dtype == np.uint8
    assert same_labels.dtype == np.int32
    np.testing.assert_array_equal(labels, same_labels)
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    error = np.abs(digits.to_8x8(images) - features)
    assert error.mean() < 0.15  # of 16
    assert error.max() < 2


def test_to_8x8_averages_blocks():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, 4:8, 8:10] = 255  # half of the block in row 1, column 2
    features = digits.to_8x8(image).reshape(8, 8)
    assert features[1, 2] == pytest.approx(8)
    assert features.sum() == pytest.approx(8)
    np.testing.assert_array_equal(digits.to_8x8(image[..., 0]), digits.to_8x8(image))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"split is 'validation'"):
        digits.load_digits("validation")
    with pytest.raises(ValueError, match=r"shape \(1, 28, 28, 3\).*\(N, 32, 32, C\) uint8"):
        digits.to_8x8(np.zeros((1, 28, 28, 3), np.uint8))
    with pytest.raises(ValueError, match="float64"):
        digits.to_8x8(np.zeros((1, 32, 32, 3)))
