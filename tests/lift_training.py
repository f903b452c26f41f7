"""A network so small that its training takes seconds, and a run of it."""
from pathlib import Path

from splatkit.lift.config import MVSplatConfig
from splatkit.lift.train_config import LiftLosses, LiftTrain

SMALL = MVSplatConfig(feature_dim=16, cnn_widths=(8, 16, 16), blocks=1, ffn_factor=1, depth_candidates=16, cost_width=16, cost_heads=1, refine_width=8, gaussian_width=16,
                      sh_degree=0, unit_rays=False, side=48)
SMALLEST = MVSplatConfig(feature_dim=8, cnn_widths=(8, 8, 8), blocks=1, ffn_factor=1, depth_candidates=4, cost_width=8, cost_heads=1, refine_width=8, gaussian_width=4,
                         sh_degree=0, unit_rays=False, side=32)
PAIR = {"steps": 14, "save_every": 2}       # of the run of two processes that one of is killed in


def settings(output: Path, **changes) -> LiftTrain:
    given = dict(network=SMALL, width=32, height=32, workers=0, hold=0, warmup=1, lr=1e-3, loss=LiftLosses(depth=0.1), device="cpu")
    return LiftTrain(output=output, **{**given, **changes})


def flags(output: Path, **changes) -> list[str]:
    """The same on the command line."""
    from splatkit import config
    file = output.with_suffix(".yaml")
    file.write_text(config.to_yaml(settings(output, **changes)))
    return ["--config", str(file), "-o", str(output)]
