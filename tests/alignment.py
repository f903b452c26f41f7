"""How far poses are from others, up to the similarity that photos alone cannot tell."""
import numpy as np


def centre(world_to_cam: np.ndarray) -> np.ndarray:
    return -world_to_cam[:3, :3].T @ world_to_cam[:3, 3]


def errors(found: list[np.ndarray], true: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Errors of each world_to_cam's centre (units of the truth) and rotation (degrees) after the best similarity of the centres (Umeyama 1991)."""
    a, b = (np.array([centre(w) for w in poses]) for poses in (found, true))
    x, y = a - a.mean(0), b - b.mean(0)
    u, s, vt = np.linalg.svd(y.T @ x)
    d = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation, scale = u @ d @ vt, np.trace(np.diag(s) @ d) / (x ** 2).sum()
    turned = [np.trace(t[:3, :3] @ rotation @ f[:3, :3].T) for f, t in zip(found, true)]
    return np.linalg.norm(y - scale * x @ rotation.T, axis=1), np.degrees(np.arccos(np.clip((np.array(turned) - 1) / 2, -1, 1)))
