"""Face models on a fresh machine: said, asked, fetched, checked, unpacked, used.

The servers are our own; no test here needs the network."""

import io
import sys
import threading
from hashlib import sha256
from http.server import ThreadingHTTPServer
import numpy as np
import pytest
import torch
from test_corpora import Archive, zipped
from faces2voices import cli, tracking
from faces2voices.errors import F2VError
from faces2voices.files import missing_face_models


@pytest.fixture()
def told(capfd, monkeypatch):
    "What the command line says, with its exit code, after an answer to its question."

    def tell(*args, answer=""):
        monkeypatch.setattr(sys, "argv", ["faces2voices", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        return (
            end.value.code or 0,
            out,
            [line for line in err.splitlines() if line and "%" not in line],
        )

    return tell


@pytest.fixture()
def published(monkeypatch, tmp_path):
    "A server of face models, which the package takes for the true ones, and a user without any."
    weights = io.BytesIO()
    torch.save(tracking.MobileFaceNet().state_dict(), weights)
    packed = zipped({"buffalo_sc/a.onnx": "detector", "buffalo_sc/b.onnx": "recogniser"})
    files = {
        "mediapipe.task": b"a mesh" * 500,
        "mobilefacenet.pt": weights.getvalue(),
        "buffalo_sc.zip": packed,
    }
    handler = type("Models", (Archive,), dict(served=[], cut={}, files=files))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, body in files.items():
        stem = name.split(".")[0]
        model = tracking.FACE_MODELS[stem]._replace(
            url=f"http://127.0.0.1:{server.server_port}/{name}",
            size=len(body),
            checksum=f"sha256:{sha256(body).hexdigest()}",
        )
        monkeypatch.setitem(tracking.FACE_MODELS, stem, model)
    for name in ("F2V_INSIGHTFACE", "F2V_MEDIAPIPE", "F2V_MOBILEFACENET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield handler
    server.shutdown()
    server.server_close()


def below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


BOTH = [".mediapipe/face_landmarker.task", ".mobilefacenet/mobilefacenet.pt"]


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_no_agreement_no_download(published, told, tmp_path, answer):
    code, out, _ = told("download", "faces", "--pack", "buffalo_sc", answer=answer)
    assert code == 1 and published.served == [] and below(tmp_path) == []
    assert out.count("Apache-2.0") == 2 and out.count("non-commercial research only") == 1
    assert "http://127.0.0.1" in out and "MB" in out


@pytest.mark.parametrize("args, answer", [((), "y\n"), (("--yes",), "")])
def test_both_models_come_once_and_work(published, told, tmp_path, args, answer):
    code, out, _ = told("download", "faces", *args, answer=answer)
    assert code == 0 and below(tmp_path) == BOTH and str(tmp_path / BOTH[1]) in out
    for path, name in zip(BOTH, published.files):
        assert (tmp_path / path).read_bytes() == published.files[name]
    face = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    assert tracking.make_backend("mobilefacenet").identity(face).shape == (128,)
    published.served.clear()
    code, out, _ = told("download", "faces")
    assert code == 0 and "are there" in out and published.served == []


def test_a_cut_download_of_a_model_goes_on(published, told, tmp_path):
    published.cut = {"mobilefacenet.pt": 1000}
    code, _, err = told("download", "faces", "--yes")
    assert code == 1 and len(err) == 1 and "stopped after 1000 of" in err[0]
    assert below(tmp_path) == [BOTH[0], BOTH[1] + ".part"]
    published.cut = {}
    published.served.clear()
    assert told("download", "faces", "--yes")[0] == 0 and below(tmp_path) == BOTH
    assert published.served == [("mobilefacenet.pt", 1000)]


def test_a_model_that_was_changed_on_its_way_is_not_kept(published, told, tmp_path):
    published.files = published.files | {"mediapipe.task": b"a mash" * 500}
    code, _, err = told("download", "faces", "--yes")
    assert code == 1 and len(err) == 1 and "checksum" in err[0] and below(tmp_path) == []


def test_what_the_user_has_is_left_alone(published, told, tmp_path, monkeypatch):
    mine = tmp_path / "mine.pt"
    mine.write_bytes(b"my own")
    monkeypatch.setenv("F2V_MOBILEFACENET", str(mine))
    code, _, err = told("download", "faces", "--yes")
    assert code == 1 and len(err) == 1 and "mine.pt" in err[0] and "Move it away" in err[0]
    assert published.served == [] and below(tmp_path) == ["mine.pt"]
    pack = tmp_path / ".insightface/models/buffalo_sc"
    pack.mkdir(parents=True)
    assert missing_face_models(["buffalo_sc"]) == []
    with pytest.raises(F2VError, match="not the published model"):
        missing_face_models(["mobilefacenet"])


def test_a_pack_is_unpacked_where_insightface_looks(published, told, tmp_path):
    code, out, _ = told("download", "faces", "--pack", "buffalo_sc", "--yes")
    assert code == 0 and "non-commercial" in out
    pack = tmp_path / ".insightface/models/buffalo_sc"
    assert below(pack) == ["a.onnx", "b.onnx"] and tracking.face_pack() == pack
    assert len(below(tmp_path)) == 4  # the archive is gone


def test_without_a_connection_it_is_one_line(published, told, tmp_path, monkeypatch):
    away = tracking.FACE_MODELS["mediapipe"]._replace(url="http://127.0.0.1:9/mediapipe.task")
    monkeypatch.setitem(tracking.FACE_MODELS, "mediapipe", away)
    code, _, err = told("download", "faces", "--yes")
    assert code == 1 and len(err) == 1 and "cannot be fetched" in err[0] and below(tmp_path) == []


@pytest.mark.parametrize(
    "args", [("faces", "folder"), ("grid",), ("lrs3", "folder"), ("faces", "--pack", "buffalo_x")]
)
def test_a_wrong_call_fetches_nothing(published, told, tmp_path, args):
    assert told("download", *args)[0] == 2
    assert published.served == [] and below(tmp_path) == []


def test_the_true_addresses_are_official_and_checked():
    for name, model in tracking.FACE_MODELS.items():
        assert model.url.startswith("https://") and len(model.checksum) == len("sha256:") + 64
        assert ("non-commercial" in model.licence) == name.startswith("buffalo")


def test_the_models_of_the_tests_are_the_published_ones(shared):
    file = shared / "mediapipe" / "face_landmarker.task"
    model = tracking.FACE_MODELS["mediapipe"]
    assert file.stat().st_size == model.size
    assert f"sha256:{sha256(file.read_bytes()).hexdigest()}" == model.checksum
