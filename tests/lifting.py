"""What the tests of lifting share: a network small enough for them, and one thread, for two on a busy machine wait for each other."""
import pytest
import torch

from splatkit.lift.config import MVSplatConfig

SMALL = MVSplatConfig(feature_dim=16, cnn_widths=(8, 8, 16), blocks=2, ffn_factor=1, depth_candidates=8, cost_width=16, cost_heads=2, refine_width=8, gaussian_width=16,
                      sh_degree=1, unit_rays=False, side=64)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
