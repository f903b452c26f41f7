"""COLMAP's part of sfm.py, run in a process of its own: `python -P sfm_worker.py JOB.json`. Nothing else imports pycolmap, this nothing of splatkit.

One process cannot hold both: pycolmap and Pillow's PNG writer corrupt each other's heap (pycolmap 4.2). COLMAP's log goes to stderr.
The process ends when its stdin is closed, so that it does not outlive the one that started it.
"""
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path


def main(job_file: str) -> None:
    """Reads the job and writes the largest model to its `model`, and then `result`: registered names, mean number of points that
    one of them sees, and what was tried."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    import pycolmap

    names, database, images = job["names"], job["database"], job["images"]      # names: of the photos, by the path of their copy in `images`
    pycolmap.set_random_seed(0)
    say("features")
    extraction = pycolmap.FeatureExtractionOptions(max_image_size=job["max_side"])
    pycolmap.extract_features(database, images, camera_mode=pycolmap.CameraMode.PER_FOLDER, extraction_options=extraction)
    say("matching")
    # A block is how often the log says something; of 8 pairs they take 1.7 times as long as of 100, for every block loads its photos anew.
    pairing = pycolmap.ImportedPairingOptions(match_list_path=job["pairs"], block_size=max(100, job["n_pairs"] // 10))
    pycolmap.match_image_pairs(database, pairing_options=pairing)
    best, tried = None, []
    for mapper in job["mappers"]:
        say(mapper)
        start, models = time.monotonic(), {}
        try:
            models = _map(pycolmap, mapper, database, images, job["scratch"])
        except Exception:       # of one mapper; the next may do better
            traceback.print_exc()
        largest = max(models.values(), key=lambda m: m.num_reg_images(), default=None)
        registered = largest.num_reg_images() if largest else 0
        tried.append({"mapper": mapper, "registered": registered, "seconds": round(time.monotonic() - start, 1)})
        if largest and (best is None or registered > best[1].num_reg_images()):
            best = mapper, largest
        if best and best[1].num_reg_images() >= job["enough"]:
            break
    registered, observations = [], 0.0
    if best:
        observations = best[1].compute_mean_observations_per_reg_image()
        for image in best[1].images.values():
            image.name = names[image.name]
            registered += [image.name] if image.has_pose else []
        os.makedirs(job["model"])
        best[1].write_binary(job["model"])
    result = {"mapper": best[0] if best else "", "registered": sorted(registered), "observations": round(observations, 1), "tried": tried}
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def _map(pycolmap, mapper: str, database: str, images: str, scratch: str) -> dict:
    if mapper == "global":
        options = pycolmap.GlobalPipelineOptions(random_seed=0)
        return pycolmap.global_mapping(database, images, scratch, options)
    options = pycolmap.IncrementalPipelineOptions(random_seed=0)
    if mapper == "relaxed":     # with the defaults 8 of 14 photos around a small thing are found, with these all
        options.min_num_matches, options.min_model_size = 10, 3
        options.mapper.init_min_num_inliers, options.mapper.abs_pose_min_num_inliers = 50, 15
    return pycolmap.incremental_mapping(database, images, scratch, options)


def say(stage: str) -> None:
    """Tells the parent what begins."""
    print(f"stage {stage}", file=sys.stderr, flush=True)


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    code = 1
    try:
        main(sys.argv[1])
        code = 0
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)      # what libraries do while they are unloaded cannot harm what is written
