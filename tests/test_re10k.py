"""Files of RealEstate10K's kinds: chunks, text files of cameras, evaluation indices."""
import json
import os

import numpy as np
import pytest
import torch
from lifting import write_chunk

from splatkit.errors import BadFile
from splatkit.io.re10k import read_chunk, read_index, read_txt

ROW = "0.9 1.2 0.5 0.5 0 0 1 0 0 0.25 0 1 0 -1 0 0 1 2"


def test_a_chunk_gives_photos_and_their_cameras(tmp_path):
    write_chunk(tmp_path / "0.torch", {"one": 3, "two": 2})
    one, two = read_chunk(tmp_path / "0.torch")
    assert (one.key, len(one), len(two)) == ("one", 3, 2) and one.timestamps.tolist() == [0, 33367, 66734]
    assert one.image(1).shape == (48, 64, 3) and one.image(1).std() > 20
    assert np.allclose(one.K(0, 64, 48), [[57.6, 0, 32], [0, 57.6, 24], [0, 0, 1]], atol=1e-4)
    assert np.allclose(one.world_to_cam[2], [[1, 0, 0, -0.4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("changes, said", [
    ({"cameras": torch.zeros(3, 18)}, r"cameras\[0\]: fx=0"), ({"cameras": torch.zeros(3, 17)}, r"\[3, 17\]; expected"), ({"cameras": None}, "cameras: NoneType"),
    ({"cameras": torch.full((3, 18), torch.nan)}, "NaN"), ({"cameras": torch.full((3, 18), 500.0)}, "look like pixels"), ({"cameras": torch.full((3, 18), 1.0)}, "no rotation"),
    ({"images": []}, "images: 0; expected 3"), ({"images": [torch.zeros(3)] * 3}, r"images\[0\]: torch.float32 \[3\]; expected the bytes"),
    ({"timestamps": torch.zeros(2, dtype=torch.int64)}, r"timestamps: torch.int64 \[2\]"), ({"key": 3}, "key: expected a name"),
], ids=["focal", "columns", "none", "nan", "pixels", "rotation", "no photos", "floats", "times", "key"])
def test_a_sequence_that_cannot_be_used_is_named(tmp_path, changes, said):
    write_chunk(tmp_path / "0.torch", {"one": 3}, **changes)
    with pytest.raises(BadFile, match=f"0.torch: sequence 0.*{said}"):
        read_chunk(tmp_path / "0.torch")


def test_a_damaged_photo_is_named_when_it_is_asked_for(tmp_path):
    write_chunk(tmp_path / "0.torch", {"one": 1}, images=[torch.arange(100, dtype=torch.uint8)])
    with pytest.raises(BadFile, match="one, photo 0: the picture is cut or damaged"):
        read_chunk(tmp_path / "0.torch")[0].image(0)


class Marker:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARKER"],)


def test_a_chunk_that_would_run_something_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    write_chunk(tmp_path / "0.torch", {"one": 1}, url=Marker())
    with pytest.raises(BadFile, match="only tensors and plain values are read"):
        read_chunk(tmp_path / "0.torch")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"x"])
def test_what_is_no_chunk_is_refused(tmp_path, content):
    (tmp_path / "0.torch").write_bytes(content)
    with pytest.raises(BadFile, match="no torch file, or damaged"):
        read_chunk(tmp_path / "0.torch")


def test_a_text_file_gives_cameras_with_and_without_its_url_and_timestamps(tmp_path):
    (tmp_path / "a.txt").write_text(f"https://video\n100 {ROW}\n200 {ROW}\n")
    (tmp_path / "b.txt").write_text(f"{ROW}\n")
    url, times, K, world_to_cam = read_txt(tmp_path / "a.txt")
    assert url == "https://video" and times.tolist() == [100, 200] and K.shape == (2, 3, 3)
    assert world_to_cam[1, :3, 3].tolist() == [0.25, -1, 2]
    assert read_txt(tmp_path / "b.txt")[1].tolist() == [-1]


@pytest.mark.parametrize("text, said", [("", "holds no camera"), ("https://video\n1 2 3\n", "line 2: 3 numbers"), (f"https://video\nx {ROW}\n", "line 2: .*expected numbers"),
                                        (ROW.replace("0.9", "nan"), "camera 0: holds a NaN"), (ROW.replace("0.9 1.2", "900 1200"), "camera 0: .*pixels")])
def test_a_text_file_that_cannot_be_used_names_the_line(tmp_path, text, said):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(BadFile, match=said):
        read_txt(tmp_path / "a.txt")


def test_empty_entries_of_an_index_are_left_out_and_counted(tmp_path):
    (tmp_path / "i.json").write_text(json.dumps({"a": None, "b": {"context": [0, 45], "target": [3, 4, 5]}, "c": None}))
    lines = []
    assert read_index(tmp_path / "i.json", lines.append) == {"b": ((0, 45), (3, 4, 5))}
    assert "2 of 3 sequences" in lines[0]


@pytest.mark.parametrize("text, said", [("{", "not JSON"), ("[]", "expected an object"), ('{"a": null}', "all 1 entries are null"), ('{"a": {"context": [0]}}', "'a': expected null"),
                                        ('{"a": {"context": [-1], "target": [0]}}', "'a'"), ('{"a": {"context": [true], "target": [0]}}', "'a'")])
def test_an_index_that_cannot_be_used_is_refused(tmp_path, text, said):
    (tmp_path / "i.json").write_text(text)
    with pytest.raises(BadFile, match=said):
        read_index(tmp_path / "i.json")
