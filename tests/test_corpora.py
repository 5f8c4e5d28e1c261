"Manifests, corpus readers, preparation and batches."

from itertools import chain
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter, deque
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from faces2voices import preparing
from faces2voices.audio import MEL, energy, vowel
from faces2voices.errors import CorpusError, ToolMissingError
from faces2voices.core import test_same as same
from faces2voices.tracking import Face, FaceBackend, make_backend
from faces2voices.media import write_video
from faces2voices.manifests import (
    GRID_GRAMMAR,
    Entry,
    unpack,
    download,
    download_grid,
    grid_jsgf,
    grid_text,
    grid_words,
    read_folder,
    read_grid,
    read_lrs2,
    read_lrs3,
    read_manifest,
    read_voxmm,
    write_manifest,
)
from faces2voices.augmenting import splice_clips
from faces2voices.clipfiles import decode_lips, encode_lips
from faces2voices.corpora import (
    BucketSampler,
    person_chances,
    Clip,
    ClipDataset,
    batches,
    collate,
    load_clip,
    save_clip,
    upsample_mask,
)
from faces2voices.preparing import _cluster, _facts, estimate_cost, prepare, write_targets


def made_clip(name="a", T=10, speaker_id="ann", sound=True, seed=0):
    "A clip of noise and a vowel."
    g = torch.Generator().manual_seed(seed)
    wav = vowel(torch.linspace(100, 200, 640 * T)) if sound else torch.zeros(0)
    half = 2 * T if sound else 0
    return Clip(
        name,
        speaker_id,
        "ah",
        torch.randint(0, 256, (T, 96, 96), generator=g, dtype=torch.uint8),
        torch.randint(0, 256, (112, 112, 3), generator=g, dtype=torch.uint8),
        torch.rand(T, 6, generator=g),
        torch.zeros(0),
        wav,
        torch.full((half,), 5.0),
        torch.ones(half),
        energy(wav) if sound else torch.zeros(0),
    )


# manifests


def test_a_manifest_comes_back_and_can_be_moved(tmp_path):
    (tmp_path / "a").mkdir()
    entries = [
        Entry(
            "x",
            tmp_path / "a/films/é.mp4",
            "ann",
            "it's ünïcode",
            "val",
            dict(n=1, deep=dict(a=[1, 2])),
        ),
        Entry("y", tmp_path / "out.mp4"),
    ]
    write_manifest(entries, tmp_path / "a/m.jsonl")
    assert read_manifest(tmp_path / "a/m.jsonl") == entries
    (tmp_path / "a").rename(tmp_path / "b")
    moved = read_manifest(tmp_path / "b/m.jsonl")
    assert moved[0].path == tmp_path / "b/films/é.mp4" and moved[1].path == tmp_path / "out.mp4"


ODD = "one\u2028two\u0085three\x0bfour\x1cfive"  # what `str.splitlines` takes for ends of lines


def test_a_text_with_odd_separators_is_one_line(films, tmp_path):
    write_manifest([Entry("ah", films / "ah.mp4", "ann\u2029bob", ODD)], tmp_path / "m.jsonl")
    (entry,) = read_manifest(tmp_path / "m.jsonl")
    assert (entry.text, entry.speaker_id) == (ODD, "ann\u2029bob")
    prepare([entry], tmp_path / "out", Eyes(), progress=False)
    prepare([entry], tmp_path / "out", Eyes(), progress=False)
    assert (
        read_manifest(tmp_path / "out/manifest.jsonl")[0].text
        == ODD
        == ClipDataset(tmp_path / "out")[0].text
    )


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"name": "b"', "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        ('{"path": "b.mp4"}', "line 2 lacks name"),
        ('{"name": "b", "path": 3}', "line 2 has a path that is not a string"),
        ('{"name": "../b", "path": "b.mp4"}', "cannot name a file"),
        ('{"name": "a", "path": "b.mp4"}', "'a' occurs twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    (tmp_path / "m.jsonl").write_text('{"name": "a", "path": "a.mp4"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=says):
        read_manifest(tmp_path / "m.jsonl")


def test_a_missing_manifest_is_a_corpus_error(tmp_path):
    with pytest.raises(CorpusError, match="no such manifest"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b'{"name": "\xff"}\n')
    with pytest.raises(CorpusError, match="not text in UTF-8"):
        read_manifest(tmp_path / "m.jsonl")


# readers


def test_grid_names_spell_sentences():
    assert grid_text("lwiz4p") == "lay white in z four please"
    for bad in ("bbaf2", "bbaw2n", "xbaf2n"):
        with pytest.raises(CorpusError):
            grid_text(bad)


def test_grid_of_the_real_corpus_agrees_with_its_word_times(shared):
    root = shared / "grid"
    s1 = read_grid(root)
    assert (
        len(s1) == 900
        and [len(read_grid(root, "s1", s)) for s in ("train", "val", "test")] == [800, 50, 50]
        and len(read_grid(root, "s4")) == 43
    )
    assert all(
        " ".join(w.text for w in grid_words(e)) == e.text for e in s1 + read_grid(root, "s4")
    )
    beside = read_grid(root / "others", "s33")
    assert [len(grid_words(e)) for e in beside] == [6] * 3 and beside[0].split == ""
    words = grid_words(s1[0])
    assert all(a.end <= b.start for a, b in zip(words, words[1:])) and words[-1].end < 3


def test_word_times_travel_from_the_corpus_to_the_batch(shared, prepared, tmp_path):
    "From GRID's reader through a manifest; the clips are other clips under GRID's names."
    from faces2voices.core import GRID_WORDS

    said = read_grid(shared / "grid", "s1", "test")[0].extra["words"]
    entries = read_manifest(prepared / "manifest.jsonl")
    with_words = [entries[0]._replace(extra=entries[0].extra | dict(words=said)), *entries[1:]]
    for e in entries:
        shutil.copy(prepared / f"{e.name}.npz", tmp_path)
    write_manifest(with_words, tmp_path / "manifest.jsonl")
    b = collate(list(ClipDataset(tmp_path, sound=False).add(words=GRID_WORDS)))
    middle = {round(25 * (w.start + w.end)): 1 + GRID_WORDS.index(w.text) for w in said}
    assert b.words.shape == b.units.shape and (b.words[1:] == -100).all() and b.words[0, 0] == 0
    assert all(b.words[0, t] == w for t, w in middle.items() if t < 2 * b.mask[0].sum())
    assert (collate(list(ClipDataset(tmp_path, sound=False))).words == -100).all()


@pytest.mark.parametrize(
    "words",
    [5, [["bin", 0, 1]], [[0, 1]], [[1, 0, "bin"]], [[0, float("inf"), "bin"]], [[-1, 0, "bin"]]],
)
def test_word_times_that_are_none_are_an_error(prepared, tmp_path, words):
    entries = read_manifest(prepared / "manifest.jsonl")
    write_manifest(
        [e._replace(extra=e.extra | dict(words=words)) for e in entries],
        tmp_path / "manifest.jsonl",
    )
    with pytest.raises(CorpusError, match="word times"):
        ClipDataset(tmp_path)


def test_grid_says_what_it_misses(tmp_path):
    touch(tmp_path / "s1/bbaf2n.mpg")
    touch(tmp_path / "s1/._bbaf2n.mpg")
    touch(tmp_path / "s2/holiday.mpg")
    assert [e.name for e in read_grid(tmp_path)] == ["s1_bbaf2n"]
    with pytest.raises(CorpusError, match="s1_test.txt: lists no clip"):
        read_grid(tmp_path, split="test")
    with pytest.raises(CorpusError, match="s3: no such folder"):
        read_grid(tmp_path, "s3")
    with pytest.raises(CorpusError, match="holiday: is not a GRID file name"):
        read_grid(tmp_path, "s2")
    with pytest.raises(CorpusError, match="has no word times"):
        grid_words(read_grid(tmp_path)[0])
    (tmp_path / "s1/bbaf2n.align").write_text("0 0.5 bin\n")
    with pytest.raises(CorpusError, match="bbaf2n.align: is not a list of word times"):
        grid_words(read_grid(tmp_path)[0])


def test_jsgf_is_read_by_a_recogniser():
    pocketsphinx = pytest.importorskip("pocketsphinx")
    decoder = pocketsphinx.Decoder(samprate=16000, loglevel="FATAL", lm=None)
    decoder.add_jsgf_string("grid", grid_jsgf())
    decoder.activate_search("grid")
    assert all(
        map(decoder.lookup_word, chain.from_iterable(w.values() for w in GRID_GRAMMAR.values()))
    )


def touch(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if text:
        path.with_suffix(".txt").write_text(text)


def test_lrs_layouts(tmp_path):
    touch(tmp_path / "l3/trainval/idA/50001.mp4", "Text:  I'M GLAD\nConf:  4\nRef: x\n")
    touch(tmp_path / "l3/test/idB/00001.mp4", "Text:  YES\n")
    touch(tmp_path / "l3/pretrain/idC/00001.mp4")
    assert [e[0:1] + e[2:5] for e in read_lrs3(tmp_path / "l3")] == [
        ("pretrain_idC_00001", "idC", "", "pretrain"),
        ("trainval_idA_50001", "idA", "i'm glad", "train"),
        ("test_idB_00001", "idB", "yes", "test"),
    ]
    assert [e.text for e in read_lrs3(tmp_path / "l3", "test")] == ["yes"]
    touch(tmp_path / "l2/mvlrs_v1/main/5/00001.mp4", "Text:  HELLO\nConf:  5\n")
    touch(tmp_path / "l2/mvlrs_v1/main/6/00002.mp4", "Text:  BYE\n")
    (tmp_path / "l2/train.txt").write_text("5/00001\n")
    (tmp_path / "l2/test.txt").write_text("6/00002 NF\n")
    two = read_lrs2(tmp_path / "l2")
    assert (
        [(e.text, e.split) for e in two] == [("hello", "train"), ("bye", "test")]
        and all(e.path.exists() for e in two)
        and two[0].speaker_id != two[1].speaker_id
    )
    with pytest.raises(CorpusError, match="val.txt"):
        read_lrs2(tmp_path / "l2", "val")
    touch(tmp_path / "vox/train/aB-_9/00000.mp4", "Text:  WELL\n")
    touch(tmp_path / "vox/train/aB-_9/00001.mp4", "Text:  YES\n")
    assert [e.text for e in read_voxmm(tmp_path / "vox")] == ["well", "yes"] and len(
        {e.speaker_id for e in read_voxmm(tmp_path / "vox")}
    ) == 2
    for names in (read_lrs3(tmp_path / "l3"), two, read_voxmm(tmp_path / "vox")):
        write_manifest(names, tmp_path / "m.jsonl", overwrite=True)
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    "read, split, says",
    [
        (read_lrs3, None, "should hold the folders pretrain, trainval, test"),
        (read_voxmm, None, "should hold the folders train, test"),
        (read_lrs2, None, "should hold mvlrs_v1"),
        (read_lrs3, "val", "no split 'val'"),
        (read_lrs3, "test", "test: no such folder"),
    ],
)
def test_another_layout_is_named(tmp_path, read, split, says):
    touch(tmp_path / "clips/ann/1.mp4")
    with pytest.raises(CorpusError, match=says):
        read(tmp_path, split)


def test_text_that_is_not_utf8_is_read_all_the_same(tmp_path):
    touch(tmp_path / "test/a/1.mp4")
    (tmp_path / "test/a/1.txt").write_bytes(b"Text:  CAF\xc9 AND TEA\n")
    assert read_lrs3(tmp_path)[0].text.endswith("and tea")


def test_folder_takes_any_video(tmp_path):
    touch(tmp_path / "ann/a b.MOV")
    touch(tmp_path / "bob/.x/c.webm")
    touch(tmp_path / "notes.txt")
    assert [(e.name, e.speaker_id) for e in read_folder(tmp_path)] == [
        ("ann_a_b", "ann"),
        ("bob_.x_c", ".x"),
    ]
    for empty in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(CorpusError):
            read_folder(empty)


# the downloader, against a server of our own


class Archive(BaseHTTPRequestHandler):
    files = {}
    ranges = True
    cut = {}  # name → bytes after which the connection ends
    rude = False  # it is reset, not closed
    served = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.strip("/")
        body = self.record() if name == "record" else self.files[name]
        start = (
            int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if "Range" in self.headers and self.ranges
            else 0
        )
        self.served.append((name, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        self.wfile.write(body[start : self.cut.get(name)])
        if name in self.cut and self.rude:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def record(self):
        url = f"http://127.0.0.1:{self.server.server_port}"
        return json.dumps(
            dict(
                files=[
                    dict(
                        key=k,
                        size=len(v),
                        checksum="md5:" + hashlib.md5(v).hexdigest(),
                        links=dict(self=f"{url}/{k}"),
                    )
                    for k, v in self.files.items()
                ]
            )
        ).encode()


def zipped(files):
    buf = io.BytesIO()
    with zipfile.ZipFile(buf, "w") as z:
        for name, text in files.items():
            z.writestr(name, text)
    return buf.getvalue()


@pytest.fixture()
def archive():
    handler = type(
        "Once",
        (Archive,),
        dict(
            served=[],
            cut={},
            files={
                **{
                    f"{s}.zip": zipped({f"{s}/bbaf2n.mpg": "film" * 500, "__MACOSX/x": ""})
                    for s in ("s1", "s2")
                },
                "alignments.zip": zipped({"alignments/s1/bbaf2n.align": "0 25000 bin\n"}),
            },
        ),
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}/record"
    server.shutdown()
    server.server_close()


def test_download_unpacks_and_is_done_once(tmp_path, archive):
    handler, url = archive
    download_grid(tmp_path, ["s1"], url)
    assert grid_words(read_grid(tmp_path)[0]) == [(0, 1, "bin")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alignments", "s1"]
    handler.served.clear()
    download_grid(tmp_path, ["s1"], url)
    assert handler.served == [("record", 0)]
    with pytest.raises(CorpusError, match="holds no s9.zip"):
        download_grid(tmp_path, ["s9"], url)


@pytest.mark.parametrize("ranges, rude", [(True, False), (False, False), (True, True)])
def test_a_cut_download_goes_on(tmp_path, archive, ranges, rude):
    handler, url = archive
    handler.cut, handler.ranges, handler.rude = {"s2.zip": 100}, ranges, rude
    with pytest.raises(CorpusError, match="s2.zip.*(stopped after 100 of|cannot be fetched)"):
        download_grid(tmp_path, ["s1", "s2"], url)
    assert (tmp_path / "s1/bbaf2n.mpg").exists() and not (tmp_path / "s2").exists()
    have = (tmp_path / "s2.zip.part").stat().st_size  # a reset may also lose what was under way
    assert have == 100 or rude and have < 100
    handler.cut = {}
    handler.served.clear()
    download_grid(tmp_path, ["s1", "s2"], url)
    assert handler.served == [
        ("record", 0),
        ("s2.zip", have if ranges else 0),
    ]  # nothing else is fetched again
    assert (tmp_path / "s2/bbaf2n.mpg").read_text() == "film" * 500 and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["alignments", "s1", "s2"]


def test_a_changed_file_is_fetched_anew(tmp_path, archive):
    handler, url = archive
    (tmp_path / "s1.zip.part").write_bytes(b"of an older edition" * 3)
    with pytest.raises(CorpusError, match="checksum"):
        download_grid(tmp_path, ["s1"], url)
    download_grid(tmp_path, ["s1"], url)
    assert (tmp_path / "s1/bbaf2n.mpg").exists()


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/s1.zip").write_bytes(
        zipped({"../evil": "", "../../evil": "", f"{tmp_path}/evil": "", "s1/bbaf2n.mpg": "film"})
    )
    unpack(tmp_path / "in/s1.zip", tmp_path / "in/s1")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "in",
        "in/s1",
        "in/s1/bbaf2n.mpg",
    ]


def test_a_wrong_checksum_is_not_kept(tmp_path, archive):
    handler, url = archive
    with pytest.raises(CorpusError, match="checksum"):
        download(
            url.replace("record", "s1.zip"),
            tmp_path / "s1.zip",
            len(handler.files["s1.zip"]),
            "sha256:" + "0" * 64,
        )
    assert list(tmp_path.iterdir()) == []


def test_no_connection_is_a_corpus_error(tmp_path):
    with pytest.raises(CorpusError, match="cannot be read"):
        download_grid(tmp_path, record="http://127.0.0.1:9/record")


# preparation


class Eyes(FaceBackend):
    "Knows where the face would be, if the frame is not of one colour."

    name = "eyes"

    def detect(self, frame):
        return [
            Face(
                np.array([40.0, 40, 120, 130]),
                np.array([[60.0, 70], [100, 70], [80, 92], [64, 112], [96, 112]]),
                1.0,
            )
        ] * int(frame.std() > 5)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Two films of a face (of a kind) and two files that cannot be used."
    d = tmp_path_factory.mktemp("films")
    frame = np.arange(160 * 160 * 3).reshape(160, 160, 3).astype(np.uint8)
    write_video(d / "ah.mp4", np.stack([frame] * 12), vowel(torch.full((640 * 12,), 200.0)))
    write_video(d / "silent.mp4", np.stack([frame] * 10))
    write_video(d / "wall.mp4", np.full((10, 160, 160, 3), 128, np.uint8))
    (d / "fake.mp4").write_text("no film")
    return d


@pytest.fixture(scope="module")
def prepared(films, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "prepared"
    assert prepare(read_folder(films), out, Eyes(), progress=False) == (2, 0, 2)
    return out


def test_failures_are_written_down(prepared):
    bad = {
        b["name"]: b["reason"]
        for b in map(json.loads, (prepared / "failures.jsonl").read_text().splitlines())
    }
    assert (
        bad.keys() == {"fake", "wall"}
        and bad["fake"].startswith("MediaError")
        and bad["wall"].startswith("NoFaceError")
    )
    assert all(
        e.extra.keys() == {"frames", "sound", "backend"}
        for e in read_manifest(prepared / "manifest.jsonl")
    )
    facts = {
        e.name: (e.extra["frames"], e.extra["sound"], e.extra["backend"])
        for e in read_manifest(prepared / "manifest.jsonl")
    }
    assert facts == dict(ah=(12, True, "eyes"), silent=(10, False, "eyes"))


def test_a_second_run_keeps_whole_files_and_mends_broken_ones(films, prepared):
    before = (prepared / "silent.npz").stat().st_mtime_ns
    whole = (prepared / "ah.npz").read_bytes()
    (prepared / "ah.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match="not a prepared clip"):
        load_clip(prepared / "ah.npz")
    assert prepare(read_folder(films), prepared, Eyes, progress=False) == (
        1,
        1,
        2,
    )  # here the backend is a function
    assert (prepared / "silent.npz").stat().st_mtime_ns == before and load_clip(
        prepared / "ah.npz"
    ).lips.shape == (12, 96, 96)
    assert not [p for p in prepared.iterdir() if p.name.startswith(".part")]


def test_backends_do_not_mix(films, prepared):
    with pytest.raises(CorpusError, match="'eyes', not 'other'"):
        prepare(read_folder(films), prepared, Others(), progress=False)


def test_later_calls_add_to_the_manifest(films, tmp_path):
    one, two = [e for e in read_folder(films) if e.name in ("ah", "silent")]
    prepare([one], tmp_path / "p", Eyes(), progress=False)
    prepare([two], tmp_path / "p", Eyes(), progress=False)
    assert ClipDataset(tmp_path / "p", sound=False).names == ["ah", "silent"]


def test_nothing_usable_is_an_error(films, tmp_path):
    with pytest.raises(CorpusError, match="none of 1 clips.*no such file"):
        prepare([Entry("x", films / "nowhere.mp4")], tmp_path, Eyes(), progress=False)
    with pytest.raises(CorpusError, match="twice"):
        prepare([Entry("x", films / "ah.mp4")] * 2, tmp_path, Eyes(), progress=False)


# preparation by many processes


@pytest.fixture(scope="module")
def scheduler():
    "Address of a Dask scheduler with two workers on this machine."
    dask = pytest.importorskip("dask", reason="pip install faces2voices[cluster]")
    from distributed import LocalCluster

    rules = {"distributed.scheduler.allowed-failures": 1}
    with (
        dask.config.set(rules),
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="ERROR"
        ) as cluster,
    ):
        yield cluster.scheduler_address


@pytest.fixture(params=["processes", "cluster"])
def hands(request):
    "What `prepare` is told about who works: two processes, or the address of a scheduler."
    return (
        dict(workers=2)
        if request.param == "processes"
        else dict(scheduler=request.getfixturevalue("scheduler"))
    )


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight short films and what one process makes of them.

    The third is 176 px wide and the fourth 192 px, the others 160 px.
    """
    d = tmp_path_factory.mktemp("eight")
    for i in range(8):
        width = {2: 176, 3: 192}.get(i, 160)
        frame = np.arange(160 * width * 3).reshape(160, width, 3).astype(np.uint8)
        write_video(
            d / f"films/{i}.mp4",
            np.stack([np.roll(frame, t * i, 1) for t in range(10 + i)]),
            vowel(torch.full((640 * (10 + i),), 100.0 + 20 * i)),
        )
    assert prepare(read_folder(d / "films"), d / "by_one", Eyes(), progress=False) == (8, 0, 0)
    return d


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_workers_write_what_one_process_writes(films, eight, prepared, hands, tmp_path):
    assert prepare(read_folder(films), tmp_path / "a", Eyes, **hands, progress=False) == (2, 0, 2)
    assert contents(tmp_path / "a") == contents(prepared)
    known = [
        e._replace(
            text="ä b", split="test", extra=dict(n=1, deep=dict(a=[1, dict(b=None)]), s=e.name)
        )
        for e in read_folder(eight / "films")
    ]
    assert prepare(known, tmp_path / "c", Eyes, **hands, progress=False) == (8, 0, 0)
    back = read_manifest(tmp_path / "c/manifest.jsonl")
    assert [
        e._replace(extra={k: e.extra[k] for k in ("n", "deep", "s")}) for e in back
    ] == known and load_clip(tmp_path / "c/0.npz").text == "ä b"
    assert prepare(read_folder(eight / "films"), tmp_path / "b", Eyes, **hands, progress=False) == (
        8,
        0,
        0,
    )
    assert contents(tmp_path / "b") == contents(eight / "by_one")
    assert prepare(read_folder(eight / "films"), tmp_path / "b", Eyes, **hands, progress=False) == (
        0,
        8,
        0,
    )


class Deadly(Eyes):
    "Kills its own process: at a film of 176 px once, at one of 192 px every time."

    def __init__(self, flag):
        self.flag = flag

    def detect(self, frame):
        width, again = frame.shape[1], self.flag.exists()
        if width == 176:
            self.flag.touch()
        if width == 192 or width == 176 and not again:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().detect(frame)


def test_a_killed_worker_loses_nothing(eight, hands, tmp_path):
    done = prepare(
        read_folder(eight / "films"),
        tmp_path / "out",
        partial(Deadly, tmp_path / "flag"),
        **hands,
        progress=False,
    )
    assert done.failed == 1 and sum(done) == 8 and (tmp_path / "flag").exists()
    (bad,) = map(json.loads, (tmp_path / "out/failures.jsonl").read_text().splitlines())
    assert bad["name"] == "3" and bad["reason"].startswith("KilledWorker")
    right = contents(eight / "by_one")
    assert {k: v for k, v in contents(tmp_path / "out").items() if k.endswith("npz")} == {
        k: v for k, v in right.items() if k.endswith("npz") and k != "3.npz"
    }


class Lonely(Deadly):
    "Dies at a film of 192 px while another film is in flight in another process."

    def detect(self, frame):
        if frame.shape[1] == 192:
            while not self.flag.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        self.flag.touch()
        time.sleep(0.3)
        return Eyes.detect(self, frame)


def test_the_culprit_takes_no_innocent_clip_with_it(eight, tmp_path):
    done = prepare(
        read_folder(eight / "films"),
        tmp_path / "out",
        partial(Lonely, tmp_path / "flag"),
        workers=2,
        progress=False,
    )
    bad = [
        json.loads(line)["name"]
        for line in (tmp_path / "out/failures.jsonl").read_text().splitlines()
    ]
    assert done == (7, 0, 1) and bad == ["3"]


class AsTold:
    "An executor of a Dask client that sends each clip to a place of its own."

    def __init__(self, client, calls):
        self.client, self.calls = client, calls

    def submit(self, _, entry, pickled):
        call, *args, where = self.calls[entry]
        return self.client.get_executor(pure=False, workers=where).submit(call, *args)


def test_a_task_that_nobody_takes_up_does_not_keep_the_others_waiting(scheduler, monkeypatch):
    from distributed import Client

    monkeypatch.setattr(preparing, "IDLE_SECONDS", 1)
    calls = dict(
        slow=(time.sleep, 3, None),
        lost=(abs, -1, ["tcp://127.0.0.1:1"]),
        quick=(abs, -2, None),
        unsent=(abs, -3, None),
    )
    with Client(scheduler) as client:

        def idle():
            return not any(client.processing().values())

        found = list(preparing._finished(AsTold(client, calls), deque(calls), b"", lambda: 3, idle))
    said = [(name, future and future.result()) for name, future in found]
    assert (
        said == [("quick", 2), ("unsent", 3), ("slow", None), ("lost", None)]
        and found[-1][1] is None
    )  # a long task is waited for


def test_a_worker_that_goes_before_the_first_clip_does_not_keep_the_run_waiting(
    scheduler, monkeypatch
):
    from distributed import Client

    monkeypatch.setattr(preparing, "IDLE_SECONDS", 1)
    with Client(scheduler) as client:
        monkeypatch.setattr(client, "nthreads", lambda: {"tcp://127.0.0.1:1": 1})
        preparing._compile_everywhere(client)


def test_a_cancelled_clip_fails_alone(eight, scheduler, tmp_path, monkeypatch):
    finished = preparing._finished

    class Cancels:
        def __init__(self, executor):
            self.executor, self.first = executor, True

        def submit(self, *args):
            future = self.executor.submit(*args)
            if self.first:
                future.cancel()
            self.first = False
            return future

    monkeypatch.setattr(
        preparing, "_finished", lambda executor, *args: finished(Cancels(executor), *args)
    )
    assert (
        prepare(
            read_folder(eight / "films"),
            tmp_path / "out",
            Eyes,
            scheduler=scheduler,
            progress=False,
        ).failed
        == 1
    )
    assert json.loads((tmp_path / "out/failures.jsonl").read_text())["reason"].startswith("Lost")


def test_without_dask_a_cluster_names_the_extra_and_processes_work(films, tmp_path, monkeypatch):
    for name in ("dask", "distributed", "cloudpickle"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ToolMissingError, match=r"pip install faces2voices\[cluster\]"):
        prepare(
            read_folder(films), tmp_path / "a", Eyes, scheduler="tcp://there:8786", progress=False
        )
    assert prepare(read_folder(films), tmp_path / "b", Eyes, workers=2, progress=False) == (2, 0, 2)


def test_a_script_without_a_main_guard_is_told_so(films, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from faces2voices.manifests import read_folder\n"
        "from faces2voices.preparing import prepare\n"
        "from faces2voices.tracking import CascadeBackend\n"
        "films = read_folder(sys.argv[1])\n"
        "prepare(films, sys.argv[2], CascadeBackend, workers=2, progress=False)\n"
    )
    ran = subprocess.run(
        [sys.executable, script, films, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Python's own tracker may add that a worker which was ended left semaphores behind
    said = [x for x in ran.stderr.rstrip().split("\n") if "resource_tracker" not in x]
    assert (
        ran.returncode == 1
        and said[-1].startswith("faces2voices.errors.ToolMissingError")
        and "if __name__ == '__main__':" in ran.stderr
    )


class Slow(Eyes):
    def detect(self, frame):
        time.sleep(0.15)
        return super().detect(frame)


class Asleep(Eyes):
    "Says that it has begun, and sleeps."

    def __init__(self, folder):
        self.folder = folder

    def detect(self, frame):
        (self.folder / f"{os.getpid()}.began").touch()
        time.sleep(3600)


def test_a_killed_run_goes_on_and_writes_the_same_bytes(eight, tmp_path):
    code = (
        "import sys, test_corpora as t; films = t.read_folder(sys.argv[1]); "
        "t.prepare(films, sys.argv[2], t.Slow, workers=2, progress=False)"
    )
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, "-c", code, eight / "films", out],
        env=os.environ
        | dict(
            PYTHONPATH=os.pathsep.join(
                [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
            )
        ),
        stderr=subprocess.DEVNULL,
    )

    def made():
        return len(list(out.glob("[!.]*.npz")))

    while made() < 3 and run.poll() is None:
        time.sleep(0.01)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert (
        len(workers) > 1 and not psutil.wait_procs(workers, timeout=30)[1]
    )  # no worker is left over
    half = made()
    assert 3 <= half < 8 and not (out / "manifest.jsonl").exists()
    (out / ".part-left.npz").write_bytes(b"half a clip")
    assert prepare(read_folder(eight / "films"), out, Eyes, progress=False) == (8 - half, half, 0)
    assert contents(out) == contents(eight / "by_one")


def test_ctrl_c_ends_a_run_and_its_processes(eight, tmp_path):
    code = (
        "import sys, test_corpora as t; films = t.read_folder(sys.argv[1]); "
        "asleep = t.partial(t.Asleep, t.Path(sys.argv[2])); "
        "t.prepare(films, sys.argv[2], asleep, workers=2, progress=False)"
    )
    env = os.environ | dict(
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, eight / "films", tmp_path],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(tmp_path.glob("*.began"))) < 2 and run.poll() is None:
        time.sleep(0.05)
    workers = psutil.Process(run.pid).children(recursive=True)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to everybody
    said = run.communicate(timeout=60)[1]
    assert (
        run.returncode in (-signal.SIGINT, 130)
        and len(workers) > 1
        and not psutil.wait_procs(workers, timeout=30)[1]
    )
    assert said.count("Traceback") == 1 and said.rstrip().endswith("KeyboardInterrupt")


def test_who_interrupts_a_connection_leaves_no_client_behind(scheduler, monkeypatch):
    from distributed import Client

    held = []

    def interrupted(client, *args, **more):
        held.append(client)
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "wait_for_workers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with _cluster(scheduler):
            pass
    assert held[0].status == "closed"


def test_no_scheduler_is_an_error(films, tmp_path):
    with pytest.raises(ToolMissingError, match="no workers that can do this"):
        prepare(read_folder(films), tmp_path, Eyes, scheduler="tcp:/nowhere", progress=False)
    import gc
    from distributed import Client

    assert all(c.status in ("running", "closed") for c in gc.get_objects() if type(c) is Client), (
        "a client left half made"
    )


class Others(Eyes):
    name = "other"


class Unknown:
    "What no other process can read."

    def __reduce__(self):
        return eval, ("nothing_of_this_name",)


def test_a_backend_that_cannot_travel_stops_the_run(films, hands, tmp_path):
    with pytest.raises(NameError, match="nothing_of_this_name"):
        prepare(read_folder(films), tmp_path, Unknown(), **hands, progress=False)


def missing():
    raise ToolMissingError("somewhere", "the detector is not installed")


def test_an_error_that_stops_the_run_comes_out_of_the_workers(films, prepared, hands, tmp_path):
    with pytest.raises(ToolMissingError, match="the detector is not installed"):
        prepare(read_folder(films), tmp_path, missing, **hands, progress=False)
    with pytest.raises(CorpusError, match="'eyes', not 'other'"):
        prepare(read_folder(films), prepared, Others, **hands, progress=False)


def test_what_the_command_line_asks_for(films, monkeypatch, tmp_path):
    from typer.testing import CliRunner
    from faces2voices import cli

    asked = []
    monkeypatch.setattr(
        preparing,
        "prepare",
        lambda *args, **kw: asked.append((args, kw)) or preparing.PrepareResult(2, 0, 2),
    )
    ran = CliRunner().invoke(
        cli.app,
        [
            "prepare",
            str(films),
            str(tmp_path / "out"),
            "--backend",
            "cascade",
            "--scheduler",
            "tcp://there:8786",
        ],
    )
    assert ran.exit_code == 1 and "2 clips prepared, 0 were there, 2 failed" in ran.output
    (entries, out, make, workers, scheduler), _ = asked[0]
    touch(tmp_path / "vox/test/v/00000.mp4", "Text:  YES\n")
    CliRunner().invoke(
        cli.app, ["prepare", str(tmp_path / "vox"), str(tmp_path / "out"), "--layout", "voxmm"]
    )
    assert asked[1][0][0][0].text == "yes"
    assert (
        [e.name for e in entries] == ["ah", "fake", "silent", "wall"]
        and out == tmp_path / "out"
        and make().name == "cascade"
        and scheduler == "tcp://there:8786"
    )


def test_a_plan_is_arithmetic():
    assert estimate_cost(100, 5, 1e5, cores=(1, 4)) == [(1, 20.0, 36), (4, 5.0, 36)]


def test_grid_with_a_real_face(shared, tmp_path):
    pytest.importorskip("insightface")
    entry = read_grid(shared / "grid")[0]
    prepare([entry], tmp_path, make_backend("insightface", shared / "insightface"), progress=False)
    clip = ClipDataset(tmp_path, split="train")[0]
    assert (
        clip.lips.shape == (75, 96, 96)
        and clip.wav.shape == (48000,)
        and clip.identity.shape == (128,)
        and clip.text == entry.text
    )
    assert 80 < clip.log_f0[clip.voiced > 0].exp().median() < 180  # a man's voice
    words = grid_words(entry)
    loud = (
        clip.energy[int(words[0].start * 50) : int(words[-1].end * 50)].mean()
        - clip.energy[: int(words[0].start * 50) - 5].mean()
    )
    assert loud > 1  # sound and word times agree


def test_an_npz_cannot_run_code(tmp_path):
    np.savez(
        tmp_path / "x.npz",
        **{k: np.array([print], dtype=object) for k in ("speaker", *Clip._fields[:11])},
    )
    with pytest.raises(CorpusError, match="not a prepared clip"):
        load_clip(tmp_path / "x.npz")
    assert _facts(tmp_path / "x.npz") == {}


# data sets and batches


def test_a_clip_comes_back_from_its_file(tmp_path):
    clip = made_clip()
    save_clip(clip, tmp_path / "a.npz")
    back = load_clip(tmp_path / "a.npz")
    assert back[:3] == clip[:3]
    for k in ("lips", "face", "log_f0", "voiced", "energy", "identity"):
        same(getattr(back, k), getattr(clip, k))
    same(back.wav, clip.wav, atol=2e-5)
    same(back.expression, clip.expression, atol=5e-4)


def test_a_mouth_comes_back_with_its_gaps_and_an_older_file_has_none(tmp_path):
    clip = made_clip()
    mouth = torch.randn(10, 9, 2)
    mouth[3] = torch.nan
    for name, clip_mouth in dict(
        mesh=mouth, none=None, infinite=mouth / 0, short=mouth[:5]
    ).items():
        save_clip(clip._replace(mouth=clip_mouth), tmp_path / f"{name}.npz")
    back = load_clip(tmp_path / "mesh.npz").mouth
    assert back[3].isnan().all()
    same(torch.nan_to_num(back), torch.nan_to_num(mouth))
    assert load_clip(tmp_path / "none.npz").mouth.shape == (10, 0, 2)
    for name in ("infinite", "short"):
        with pytest.raises(CorpusError, match="its mouth"):
            load_clip(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    "lips",
    [
        np.random.default_rng(0).integers(0, 256, (30, 96, 96)),
        np.zeros((1, 96, 96)),
        np.tile(np.arange(96) * 2, (3, 96, 1)),
        np.full((2, 96, 96), 255),
    ],
)
def test_coded_lips_lose_nothing(lips):
    lips = lips.astype(np.uint8)
    coded = encode_lips(lips)
    same(decode_lips(coded), lips)
    assert encode_lips(lips).tobytes() == coded.tobytes()


def test_files_of_an_older_form_are_read_and_false_ones_are_not(tmp_path):
    clip = made_clip()
    arrays = {k: v.numpy() for k, v in clip._asdict().items() if torch.is_tensor(v)} | dict(
        name="a", speaker="ann", text="ah", backend="eyes"
    )
    np.savez(
        tmp_path / "old.npz", **arrays | dict(wav=np.round(arrays["wav"] * 32767).astype(np.int16))
    )
    same(load_clip(tmp_path / "old.npz").lips, clip.lips)
    assert _facts(tmp_path / "old.npz")["frames"] == 10
    coded = encode_lips(arrays["lips"])
    for name, lips in dict(
        cut=coded[: len(coded) // 2],
        noise=np.arange(999).astype(np.uint8),
        empty=coded[:0],
        short=encode_lips(arrays["lips"][:5]),
    ).items():
        np.savez(tmp_path / f"{name}.npz", **arrays | dict(lips=lips))
        with pytest.raises(CorpusError, match="not a prepared clip"):
            load_clip(tmp_path / f"{name}.npz")


class Parity(nn.Module):
    "A quantizer of a kind: is the unit's energy above its mean?"

    def forward(self, wav):
        return (energy(wav) > energy(wav).mean()).long()


class Mean(nn.Module):
    "A speaker encoder of a kind."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(80, 256))

    def forward(self, mel, mask):
        return nn.functional.normalize(mel.mean(-1) @ self.w, dim=-1)


def test_targets_are_computed_once_and_are_those_of_the_clip():
    clips = [made_clip("a", 10), made_clip("b", 6, seed=1)]
    dataset = ClipDataset(clips).add(units=Parity(), speaker_encoder=Mean())
    same(dataset[1].mel, MEL.normalize(MEL(clips[1].wav)))
    same(dataset[1].units, Parity()(clips[1].wav))
    assert dataset[0].voice.shape == (256,) and not dataset[0].voice.requires_grad
    assert dataset[0].mel is dataset[0].mel
    same(collate([dataset[0], dataset[1]]).units, collate(clips, Parity(), Mean()).units)
    assert [c.name for c in dataset] == ["a", "b"] and ClipDataset(clips, names=["b"]).names == [
        "b"
    ]


class Mine(Parity):
    "Another quantizer: its weights differ."

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.ones(1))


@pytest.fixture()
def talk(tmp_path):
    "A folder of four prepared clips, one of them without sound."
    folder = tmp_path / "talk"
    clips = [made_clip(str(i), 6 + i, sound=i < 3, seed=i) for i in range(4)]
    for c in clips:
        save_clip(c, folder / f"{c.name}.npz", "eyes")
    write_manifest(
        [
            Entry(
                c.name,
                folder / "x.mp4",
                extra=dict(frames=len(c.lips), sound=len(c.wav) > 0, backend="eyes"),
            )
            for c in clips
        ],
        folder / "manifest.jsonl",
    )
    return folder


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.stat().st_mtime_ns
        for p in folder.rglob("*.safetensors")
    }


def test_stored_targets_are_those_of_the_clip_and_are_written_once(talk):
    computed = list(ClipDataset(talk).add(units=Parity(), speaker_encoder=Mean()))
    dataset = write_targets(ClipDataset(talk), Parity(), Mean(), progress=False)
    before = files(talk)
    assert len(before) == 3
    with pytest.MonkeyPatch.context() as patch:  # from now on nothing is computed
        patch.setattr(Parity, "forward", None)
        patch.setattr(Mean, "forward", None)
        patch.setattr(type(MEL), "__call__", None)
        for clip, right in zip(dataset, computed, strict=True):
            assert (
                torch.equal(clip.units, right.units)
                and torch.equal(clip.voice, right.voice)
                and clip.units.dtype == torch.long
            )
            same(clip.mel, right.mel, atol=2e-3)  # half precision
        write_targets(ClipDataset(talk), Parity(), Mean(), progress=False)
    assert files(talk) == before
    lost = next(talk.rglob("1.safetensors"))
    lost.unlink()
    write_targets(ClipDataset(talk), Parity(), Mean(), progress=False)
    assert {k for k, v in files(talk).items() if before[k] != v} == {
        lost.relative_to(talk).as_posix()
    }


def test_targets_of_other_weights_are_not_read(talk):
    dataset = write_targets(ClipDataset(talk), Parity(), Mean(), progress=False)
    other = Mean()
    with torch.no_grad():
        other.w[0, 0] = 3.0
    later = write_targets(ClipDataset(talk), Mine(), other, progress=False)
    assert len(files(talk)) == 6 and not torch.equal(later[0].voice, dataset[0].voice)
    same(later[0].voice, ClipDataset(talk).add(speaker_encoder=other)[0].voice)
    same(later.add(speaker_encoder=Mean())[0].voice, dataset[0].voice)


def test_targets_go_elsewhere_where_nothing_can_be_written(talk, tmp_path):
    (talk / "targets").write_text("a file where the folder should be")
    with pytest.raises(CorpusError, match="cannot be written"):
        write_targets(ClipDataset(talk), Parity(), Mean(), progress=False)
    dataset = write_targets(ClipDataset(talk), Parity(), Mean(), tmp_path / "run", progress=False)
    assert len(files(tmp_path / "run")) == 3 and dataset[0].units is not None
    next((tmp_path / "run").rglob("0.safetensors")).write_bytes(b"half a file")
    with pytest.raises(CorpusError, match="0.safetensors: cannot be read"):
        ClipDataset.read(dataset, "0")


def test_the_command_line_writes_targets(talk, monkeypatch):
    from typer.testing import CliRunner
    from faces2voices import cli

    monkeypatch.setattr(preparing, "prepare", lambda *args, **kw: preparing.PrepareResult(0, 4, 0))
    ran = CliRunner().invoke(
        cli.app, ["prepare", str(talk), str(talk), "--targets", "talkers", "--workers", "1"]
    )
    assert ran.exit_code == 0 and len(files(talk)) == 3, ran.output


def test_processes_write_the_same_targets(talk, tmp_path):
    shutil.copytree(talk, tmp_path / "twin")
    write_targets(ClipDataset(talk), Parity(), Mean(), progress=False)
    write_targets(ClipDataset(tmp_path / "twin"), Parity(), Mean(), workers=2, progress=False)

    def of(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}

    assert of(talk) == of(tmp_path / "twin") and len(of(talk)) == 3


def test_soundless_clips_have_no_targets_and_are_read_all_the_same(talk):
    dataset = write_targets(ClipDataset(talk, sound=False), Parity(), Mean(), progress=False)
    assert len(files(talk)) == 3 and dataset[3].units is None and (dataset[3].mel == 0).all()


EPOCH = """
import resource, sys
from faces2voices.corpora import ClipDataset, batches
dataset = ClipDataset(sys.argv[1])
draw = batches(dataset, 8)
for step in range(len(dataset)//8): draw(step)
print(len(dataset), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_an_epoch_over_many_clips_needs_no_more_memory_than_one_over_few(tmp_path):
    """The clips are links to 20 files, and hold pixels instead of video.

    What is kept is the same, and they are read faster. The peak is the one that the kernel saw.
    glibc keeps what is freed in a heap with holes, which grow with the number of clips of different
    lengths that came and went, whatever is kept of them; so every array gets pages of its own
    (MALLOC_MMAP_THRESHOLD_), which go back at once. Counters inside Python see neither numpy's nor
    torch's buffers alike, and what is left at the end says nothing of the peak.
    """
    for i in range(20):
        clip = made_clip(str(i), 75, seed=i)
        arrays = {k: v.numpy() for k, v in clip._asdict().items() if torch.is_tensor(v)}
        np.savez(
            tmp_path / f"clip{i}.npz",
            **arrays
            | dict(
                wav=np.round(arrays["wav"] * 32767).astype(np.int16),
                name="a",
                speaker="ann",
                text="ah",
                backend="eyes",
            ),
        )
    peaks, whole = [], os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536")
    for n in (200, 2000):
        folder = tmp_path / str(n)
        folder.mkdir()
        for i in range(n):
            (folder / f"{i}.npz").symlink_to(tmp_path / f"clip{i % 20}.npz")
        write_manifest(
            [
                Entry(str(i), folder / "x.mp4", extra=dict(frames=75, sound=True, backend="eyes"))
                for i in range(n)
            ],
            folder / "manifest.jsonl",
        )
        ran = subprocess.run(
            [sys.executable, "-c", EPOCH, folder],
            env=whole,
            check=True,
            capture_output=True,
            text=True,
        )
        read, peak = map(int, ran.stdout.split())
        assert read == n
        peaks.append(peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.1)


def test_a_padded_batch_holds_each_clip_unchanged():
    clips = [made_clip("a", 10), made_clip("b", 6, seed=1), made_clip("c", 3, seed=2)]
    batch = collate(clips, Parity(), Mean())
    assert (
        batch.lips.shape == (3, 1, 10, 88, 88)
        and batch.mel.shape == (3, 80, 40)
        and batch.units.dtype == torch.long
    )
    assert batch.mask.sum(1).tolist() == [10, 6, 3]
    for i, clip in enumerate(clips):
        T, alone = len(clip.lips), collate([clip], Parity(), Mean())
        same(batch.mel[i, :, : 4 * T], alone.mel[0])
        same(batch.lips[i, :, :T], alone.lips[0])
        same(batch.units[i, : 2 * T], alone.units[0])
        same(batch.speaker[i], alone.speaker[0])
        same(batch.expression[i, :T], clip.expression)
        same(batch.energy[i, : 2 * T], clip.energy)
        same(alone.lips[0, 0], (clip.lips[:, 4:92, 4:92] / 255 - 0.421) / 0.165, atol=1e-5)
        same(alone.face[0], clip.face.permute(2, 0, 1) / 127.5 - 1, atol=1e-6)
        assert (
            (batch.units[i, 2 * T :] == -100).all()
            and (batch.lips[i, :, T:] == 0).all()
            and (batch.mel[i, :, 4 * T :] == 0).all()
        )


def test_mask_to_repeats():
    mask = torch.tensor([[True, False], [True, True]])
    same(upsample_mask(mask, 2), torch.tensor([[True, True, False, False], [True] * 4]))
    assert upsample_mask(mask, 4).dtype == torch.bool


def test_training_views_are_windows_of_the_clip():
    clip = made_clip(T=1)
    batch = collate([clip] * 40, augment=1, rng=torch.Generator().manual_seed(0))

    def flat(x):
        x = x.flatten(1).float()
        return nn.functional.normalize(x - x.mean(1, keepdim=True), dim=1)

    windows = clip.lips.unfold(1, 88, 1).unfold(2, 88, 1).reshape(-1, 88, 88)
    alike = (
        flat(batch.lips[:, 0, 0]) @ flat(torch.cat([windows, windows.flip(-1)])).T
    )  # brightness changes nothing in a correlation
    assert alike.shape == (40, 162) and (alike.amax(1) > 0.9999).all()
    assert 8 < (alike.argmax(1) >= 81).sum() < 32 and len(set(alike.argmax(1).tolist())) > 20
    assert 0.05 < batch.lips.mean((1, 2, 3, 4)).std() < 0.5


def test_strong_variation_hides_short_stretches_and_nothing_else():
    clips = [made_clip(str(i), 100, speaker_id=str(i), seed=i) for i in range(3)]
    batch = collate(clips, augment=2, rng=torch.Generator().manual_seed(0))
    hidden = (batch.lips == 0).all((1, 3, 4))
    assert 0.05 < hidden.float().mean() < 0.35
    for row in hidden:
        runs = [len(r) for r in "".join("x" if h else " " for h in row).split()]
        assert runs and max(runs) <= 20  # two stretches of ten may touch
    plain = collate(clips)
    for k in ("mel", "log_f0", "energy", "expression"):
        same(getattr(batch, k), getattr(plain, k))
    assert batch.mask.all()


def test_a_joined_clip_has_the_targets_of_both():
    def constant(name, value, T=40):
        c = made_clip(name, T, seed=value)

        def fill(x):
            return torch.full_like(x, value)

        return c._replace(
            lips=fill(c.lips),
            expression=fill(c.expression),
            wav=fill(c.wav),
            log_f0=fill(c.log_f0),
            voiced=fill(c.voiced),
            energy=fill(c.energy),
            mel=torch.full((80, 4 * T), float(value)),
            units=torch.full((2 * T,), value),
            voice=torch.zeros(256),
        )

    stranger = constant("c", 7)._replace(speaker_id="bob")
    joined = splice_clips(
        [constant("a", 1), constant("b", 2), stranger] * 8, torch.Generator().manual_seed(0)
    )
    kinds = set()
    for c in joined:
        values = c.expression[:, 0]
        kinds.add(tuple(values.unique().int().tolist()))
        same(c.lips[:, 0, 0].float(), values)
        same(c.mel[0], values.repeat_interleave(4))
        same(c.wav, values.repeat_interleave(640))
        for k in ("log_f0", "voiced", "energy"):
            same(getattr(c, k), values.repeat_interleave(2))
        same(c.units, values.repeat_interleave(2).long())
        change = (values.diff() != 0).nonzero()
        assert len(change) <= 1 and ("7" not in str(values.unique()) or len(values.unique()) == 1)
    assert {(1,), (2,), (1, 2), (7,)} <= kinds


def test_a_batch_is_a_function_of_its_step():
    dataset = ClipDataset([made_clip(str(i), 4 + i % 5, seed=i) for i in range(11)])
    a, b = batches(dataset, 3, seed=4), batches(dataset, 3, seed=4)
    a(0)
    for step in (7, 2):
        assert a(step).names == b(step).names
        same(a(step).lips, b(step).lips)

    def names(*steps):
        return list(chain.from_iterable(a(step).names for step in range(*steps)))

    epoch = names(3)
    assert len(set(epoch)) == 9 and epoch != names(3, 6)
    assert len(set(names(12))) == 11  # the odd ones change from epoch to epoch
    assert batches(dataset, 64)(0).mask.shape[0] == 11


def test_buckets_cover_everything_and_pad_little():
    lengths = np.random.default_rng(0).integers(20, 200, 960)
    sampler = BucketSampler(lengths, 16)
    plan = sampler.plan(0)
    assert sorted(sum(plan, [])) == list(range(960)) and plan == BucketSampler(lengths, 16).plan(
        0
    ) != sampler.plan(1)

    def padded(batches):
        return sum(lengths[b].max() * 16 for b in batches) / lengths.sum() - 1

    assert (
        padded(plan)
        < 0.08
        < 0.5
        < padded(np.random.default_rng(1).permutation(960).reshape(-1, 16))
    )


def test_people_are_drawn_as_evenly_as_their_balance_says():
    people = ["ann"] * 90 + ["bob"] * 9 + ["cat"]
    half = np.sqrt([90, 9, 1])
    expected = {0.0: [0.9, 0.09, 0.01], 0.5: half / half.sum(), 1.0: [1 / 3] * 3}
    for balance, shares in expected.items():
        sampler = BucketSampler([20] * 100, 10, 0, person_chances(people, balance))
        drawn = np.concatenate([np.ravel(sampler.plan(epoch)) for epoch in range(100)])
        counts = Counter(people[i] for i in drawn)
        found = [counts[name] / len(drawn) for name in ("ann", "bob", "cat")]
        np.testing.assert_allclose(found, shares, atol=0.02)  # 10 000 draws: 4 σ


def test_the_sampler_drives_a_dataloader():
    dataset = ClipDataset([made_clip(str(i), 4, seed=i) for i in range(6)])
    loader = DataLoader(
        dataset,
        batch_sampler=BucketSampler(dataset.lengths, 2),
        collate_fn=partial(collate, augment=1),
    )
    assert len(loader) == 3 and sorted(chain.from_iterable(b.names for b in loader)) == list(
        "012345"
    )


def test_soundless_clips_are_left_out_of_training_but_can_be_collated(prepared):
    assert ClipDataset(prepared).names == ["ah"] and len(ClipDataset(prepared, sound=False)) == 2
    batch = collate([load_clip(prepared / "silent.npz")], Parity(), Mean())
    assert (
        (batch.units == -100).all()
        and batch.mel.shape == (1, 80, 40)
        and (batch.mel == 0).all()
        and batch.log_f0.shape == (1, 20)
    )
    assert ClipDataset([made_clip("q", sound=False), made_clip("r")]).names == ["r"]


def test_a_folder_that_was_not_prepared(tmp_path):
    write_manifest([Entry("x", tmp_path / "x.mp4")], tmp_path / "manifest.jsonl")
    with pytest.raises(CorpusError, match="does not hold prepared clips"):
        ClipDataset(tmp_path)


def test_batch_moves_to_a_device():
    batch = collate([made_clip()]).to("meta")
    assert batch.mel.device.type == "meta" and batch.names == ["a"]
