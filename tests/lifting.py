"""What the tests of lifting share: a network small enough for them, and chunks as RealEstate10K has them."""
import torch

from splatkit.lift.config import MVSplatConfig

SMALL = MVSplatConfig(feature_dim=16, cnn_widths=(8, 8, 16), blocks=2, ffn_factor=1, depth_candidates=8, cost_width=16, cost_heads=2, refine_width=8, gaussian_width=16,
                      sh_degree=1, unit_rays=False, side=64)


def write_chunk(path, sequences, width=64, height=48, **changes):
    """A `.torch` chunk of sequences of so many photos; `changes` lie over the first sequence."""
    import io

    import numpy as np
    from PIL import Image
    rng, entries = np.random.default_rng(0), []
    for key, count in sequences.items():
        rows = torch.tensor([0.9, 1.2, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]).repeat(count, 1)
        rows[:, 9] = -0.2 * torch.arange(count)
        pictures = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height)).save(file, "JPEG")
            pictures.append(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
        entries.append({"url": "https://video", "timestamps": 33_367 * torch.arange(count), "cameras": rows, "images": pictures, "key": key})
    entries[0].update(changes)
    torch.save(entries, path)
