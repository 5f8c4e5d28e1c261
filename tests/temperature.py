"""What the temperature of the flow does to speech, for lesson 13: `python tests/temperature.py`.

The packaged model `talkers` speaks every clip of data_samples that is not a test clip, under each
number of steps and each temperature (ten minutes on one core). Scores are kept clip by clip,
because the clips differ more than the settings do."""

from itertools import chain, product
from pathlib import Path

from faces2voices.manifests import read_manifest
from faces2voices.corpora import clip_of
from faces2voices.experiments import sweep
from faces2voices.records import record
from faces2voices.synthesis import FacesToVoices
from faces2voices.video import preprocess

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "nbs" / "results" / "temperature.json"
SETTINGS = list(product((2, 10), (1.0, 0.3, 0.0)))  # Euler steps, temperature


def scored(model, entry) -> list:
    "One clip's scores, a row for each setting."
    clip = clip_of(
        entry.name, preprocess(entry.path, model.face_backend), entry.speaker_id, entry.text
    )
    found = sweep(model, [clip], {(n, tau): dict(steps=n, temperature=tau) for n, tau in SETTINGS})
    return [dict(clip=clip.name, steps=n, temperature=tau, **found[n, tau]) for n, tau in SETTINGS]


def main():
    model = FacesToVoices.from_pretrained("talkers", device="cpu")
    entries = [
        e for e in read_manifest(ROOT / "data_samples" / "manifest.jsonl") if e.split != "test"
    ]
    rows = list(chain.from_iterable(scored(model, entry) for entry in entries))
    found = dict(model="talkers", clips=len(entries), rows=rows)
    tools = "pystoi", "librosa", "speechmos", "pocketsphinx", "jiwer"
    record(found, "python tests/temperature.py", 0, {}, tools, OUT, overwrite=True)


if __name__ == "__main__":
    main()
