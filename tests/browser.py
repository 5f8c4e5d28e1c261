"""Widgets in a real browser: `python tests/browser.py` (needs Chromium; not part of `make test`).

Starts JupyterLab, opens each widget in headless Chromium through the DevTools protocol, runs its
cells, drags every slider, turns every switch and list, and fails unless each changes the picture
and the console stays free of errors. Pictures of the page go to --out."""

import argparse
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
import websocket

SAMPLES = Path(__file__).resolve().parents[1] / "data_samples"
SPEAKER = f"""from pathlib import Path
from faces2voices.report import dials_widget, mute_widget
from faces2voices.synthesis import FacesToVoices
f2v = FacesToVoices.from_pretrained("talkers", device="cpu")
samples = sorted(Path({str(SAMPLES)!r}).glob("*.mp4"))
clip, _ = f2v.preprocess(samples[0])
other = f2v.voice_like(face=samples[4])
"""

WIDGETS = dict(  # each stands alone, so that its lesson need not be run first
    field="""
from faces2voices.flow import field_explorer, gaussian_field
field_explorer(lambda x, t: gaussian_field(x, t, 1.0, 0.5))
""",
    talker="""
from faces2voices.talkers import talker_widget
talker_widget()
""",
    race="""
import torch
from faces2voices.solvers import solver_race
means = torch.tensor([[-2.0, 0], [2, 0], [0, 2]])
solver_race((means, torch.full((3,), 0.3), torch.full((3,), 1 / 3)));
""",
    bend="""
import torch
from faces2voices.prosody import bend_widget
def tone(x):
    turns = x.exp().repeat_interleave(320).cumsum(0) / 16000
    return 0.1 * (2 * torch.pi * turns).sin()
bend_widget(5 + 0.2 * (torch.arange(100) / 8).sin(), torch.ones(100), tone)
""",
    dials=SPEAKER
    + """
own = f2v.predict_speaker(clip.face, clip.identity)
dials_widget(f2v, clip, dict(own=own, other=other))
""",
    mute=SPEAKER + "mute_widget(f2v, clip, other)",
)


def cell(code):
    return dict(
        cell_type="code",
        id=f"c{abs(hash(code)) % 10**9}",
        metadata={},
        source=code.splitlines(True),
        outputs=[],
        execution_count=None,
    )


def notebook(code):
    return dict(
        nbformat=4,
        nbformat_minor=5,
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
        cells=[cell(code)],
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(what, seconds, why):
    "The first true value of `what()`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.3)
    raise SystemExit(f"{why}: not within {seconds} s")


@contextmanager
def running(command, **more):
    process = subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextmanager
def jupyter(folder):
    "JupyterLab on `folder`, without news and updates; its address."
    port, settings = free_port(), folder / ".settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps(dict(fetchNews="false", checkForUpdates=False, doNotDisturbMode=True))
    )
    env = os.environ | dict(
        JUPYTERLAB_SETTINGS_DIR=str(folder / ".settings"),
        JUPYTERLAB_WORKSPACES_DIR=str(folder / ".workspaces"),
        OMP_NUM_THREADS="1",
    )
    command = [
        Path(sys.executable).parent / "jupyter-lab",
        "--no-browser",
        "--expose-app-in-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        f"--ServerApp.root_dir={folder}",
    ]
    with running(command, env=env, cwd=folder):
        url = f"http://127.0.0.1:{port}"
        wait(
            lambda: urllib.request.urlopen(f"{url}/api").status == 200,
            120,
            "JupyterLab does not answer",
        )
        yield url


class Page:
    "A tab of Chromium, spoken to through the DevTools protocol."

    def __init__(self, address):
        self.socket = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.number = 0
        self.errors = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        "Send a command and wait for its answer; what the console says on the way is noted."
        self.number += 1
        self.socket.send(json.dumps(dict(id=self.number, method=method, params=params)))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("id") == self.number:
                return said.get("result", {})
            self.note(said.get("method"), said.get("params", {}))

    def note(self, method, p):
        if method == "Page.javascriptDialogOpening":
            self.socket.send(
                json.dumps(
                    dict(id=0, method="Page.handleJavaScriptDialog", params=dict(accept=True))
                )
            )
        if method == "Runtime.exceptionThrown":
            self.errors.append(
                p["exceptionDetails"].get("exception", {}).get("description")
                or p["exceptionDetails"]["text"]
            )
        if method == "Runtime.consoleAPICalled" and p["type"] == "error":
            self.errors.append(
                " ".join(str(a.get("value") or a.get("description")) for a in p["args"])
            )
        if method == "Log.entryAdded" and p["entry"]["level"] == "error":
            self.errors.append(f"{p['entry']['text']} {p['entry'].get('url', '')}")

    def run(self, script):
        return (
            self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
            .get("result", {})
            .get("value")
        )

    def drag(self, x, y, dx):
        for kind, at in (
            ("mousePressed", x),
            ("mouseMoved", x + dx / 2),
            ("mouseMoved", x + dx),
            ("mouseReleased", x + dx),
        ):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=at,
                y=y,
                button="left",
                buttons=1,
                clickCount=1,
            )
            time.sleep(0.1)

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def chromium(program):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        with running(
            [
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-port=0",
                "--window-size=1300,1400",
                f"--user-data-dir={home}",
                "about:blank",
            ]
        ):
            port = wait(
                lambda: (Path(home) / "DevToolsActivePort").read_text().split()[0],
                60,
                "Chromium does not start",
            )
            tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            yield Page(next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"))


PANEL = "[...jupyterapp.shell.widgets('main')].find(w => w.sessionContext)"
PICTURES = """[...document.querySelectorAll(
    '.jp-OutputArea img, .jp-OutputArea canvas, .jp-OutputArea audio'
)].map(e => e.src || e.toDataURL()).join('\\n')"""
SLIDERS = """[...document.querySelectorAll('.jp-OutputArea .noUi-handle')].map(e => {
    e.scrollIntoView({block: 'center'});
    let r = e.getBoundingClientRect();
    let b = e.closest('.noUi-base, .noUi-target').getBoundingClientRect();
    return [r.x + r.width/2, r.y + r.height/2, b.x, b.width]
})"""
SWITCHES = """[...document.querySelectorAll(
    '.jp-OutputArea .jupyter-widgets input[type=checkbox], '
    + '.jp-OutputArea .jupyter-widgets select'
)]"""
TURN = """(e => {
    if (e.type === 'checkbox') e.click();
    else {
        e.selectedIndex = e.options.length - 1;
        e.dispatchEvent(new Event('change', {bubbles: true}))
    }
})"""
IDLE = f"{PANEL}?.sessionContext.session?.kernel?.status === 'idle'"
ERRORS = """[...document.querySelectorAll(
    '.jp-OutputArea [data-mime-type="application/vnd.jupyter.error"], '
    + '.jp-OutputArea [data-mime-type="application/vnd.jupyter.stderr"]'
)].map(e => e.innerText)"""


def drag(page, i):
    "Take a slider by half of its range to the side where there is more room."
    x, y, left, width = page.run(SLIDERS)[i]
    page.drag(x, y, (width * 0.5 if x < left + width / 2 else -width * 0.5))


def moves(page):
    "All that can be moved on the page: its name, and the move."
    for i in range(len(page.run(SLIDERS))):
        yield f"slider {i + 1}", partial(drag, page, i)
    for i in range(page.run(f"{SWITCHES}.length")):
        yield f"switch {i + 1}", partial(page.run, f"{TURN}({SWITCHES}[{i}])")


def try_widget(page, url, name, out, seconds):
    "Open a notebook, run it, move all that can be moved; what is wrong, in words."
    page.errors.clear()
    page.call("Page.navigate", url=f"{url}/lab/tree/{name}.ipynb?reset")
    wait(
        lambda: page.run(
            "!!(window.jupyterapp && document.querySelector('.jp-Notebook .jp-CodeCell'))"
        ),
        120,
        f"{name}: the notebook does not open",
    )
    wait(lambda: page.run(IDLE), 120, f"{name}: no kernel")
    page.run(
        f"jupyterapp.shell.activateById({PANEL}.id); "
        "jupyterapp.commands.execute('notebook:run-all-cells')"
    )
    wait(
        lambda: (page.run(SLIDERS) or page.run(f"{SWITCHES}.length")) and page.run(PICTURES),
        seconds,
        f"{name}: no control with a picture (cell errors: {page.run(ERRORS)})",
    )
    wrong = []
    for what, move in moves(page):
        time.sleep(2)
        # until what the last move asked for is there
        wait(lambda: page.run(IDLE), seconds, f"{name}: never done")
        before = page.run(PICTURES)
        move()
        try:
            wait(lambda: page.run(PICTURES) != before, seconds, "still")
        except SystemExit:
            wrong.append(f"{what} changes nothing")
    page.picture(out / f"{name}.png")
    wrong += [f"cell: {e[:200]}" for e in page.run(ERRORS)]
    # `beforeunload` is the browser's word on leaving a changed notebook
    return wrong + [f"console: {e[:300]}" for e in page.errors if "beforeunload" not in e]


def main():
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument(
        "lessons",
        nargs="*",
        type=Path,
        help="notebooks to open instead of the widgets alone (slow: all cells are run)",
    )
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    ask.add_argument("--chromium", default=next(filter(None, found), None))
    ask.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    ask.add_argument("--seconds", type=float, default=120, help="patience for a picture")
    said = ask.parse_args()
    if not said.chromium:
        raise SystemExit("Chromium is not installed: nothing was tested")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        for name, code in ({} if said.lessons else WIDGETS).items():
            (folder / f"{name}.ipynb").write_text(json.dumps(notebook(code)))
        for path in said.lessons:
            shutil.copy(path, folder)
        url = stack.enter_context(jupyter(folder))
        page = stack.enter_context(chromium(said.chromium))
        found = {
            p.stem: try_widget(page, url, p.stem, said.out, said.seconds)
            for p in sorted(folder.glob("*.ipynb"))
        }
    for name, wrong in found.items():
        print(f"{name}: {'; '.join(wrong) or 'fine'}")
    raise SystemExit(int(any(found.values())))


if __name__ == "__main__":
    main()
