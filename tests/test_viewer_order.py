"""The order in which the page blends Gaussians, against float32 arithmetic written out in numpy."""
import json

import numpy as np
import pytest
from browser import bundled, in_node


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    folder = tmp_path_factory.mktemp("order")
    script = bundled("order", folder)

    def run(means: np.ndarray, key: np.ndarray, near: float = 0.01, visible=None) -> list[int]:
        (folder / "means.bin").write_bytes(means.astype("<f4").tobytes())
        return in_node(script, folder / "means.bin", json.dumps([[float(k) for k in key], near, visible]))

    return run


def expected(means: np.ndarray, key: np.ndarray, near: float = 0.01) -> list[int]:
    m, k = means.astype(np.float32), key.astype(np.float32)
    depth = ((k[0] * m[:, 0] + k[1] * m[:, 1]) + k[2] * m[:, 2]) + k[3]      # numpy rounds each product and sum by itself
    rows = np.flatnonzero((depth >= np.float32(near)) & (depth < np.float32(1e30)))
    return rows[np.argsort(depth[rows], kind="stable")].tolist()


def test_rows_come_by_float32_depth_and_those_behind_the_near_plane_do_not(order):
    rng = np.random.default_rng(0)
    means, key = rng.normal(size=(5000, 3)) * 3, np.array([0.36, -0.48, 0.8, 1.7])
    assert order(means, key) == expected(means, key)


def test_equal_depths_keep_the_order_of_the_rows(order):
    rng = np.random.default_rng(1)
    means = np.concatenate([rng.normal(size=(400, 2)), rng.integers(1, 4, size=(400, 1))], axis=1)
    assert order(means, np.array([0, 0, 1, 0])) == expected(means, np.array([0.0, 0, 1, 0]))


def test_depths_that_differ_in_the_last_bit_are_told_apart(order):
    z = np.float32(1.5)
    above = np.nextafter(z, np.float32(2))
    assert order(np.array([[0, 0, above], [0, 0, z], [0, 0, above]]), np.array([0, 0, 1, 0])) == [1, 0, 2]


def test_values_that_are_not_finite_and_hidden_rows_are_left_out(order):
    means = np.array([[0, 0, 2], [np.nan, 0, 1], [0, np.inf, 1], [0, 0, 1], [0, 0, 3]])
    assert order(means, np.array([0, 1, 1, 0]), visible=[1, 1, 1, 0, 1]) == [0, 4]
