# make demo   speak the sample clips          make test   everything that must hold
# make lab    open the lessons in JupyterLab  make readme README.md from nbs/index.ipynb
# make site   the pages in _docs, by Quarto
# make test-browser   move the widgets' sliders in a real browser (Chromium)
# make test-fairseq   AV-HuBERT beside fairseq itself (Python 3.10, an environment of its own, 2 GB)
# make test-pythons   install, import, speak and test in Python 3.10, 3.11, 3.12 and 3.13, where found
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
META   := settings.ini setup.py pyproject.toml constraints.txt
# pip shows what it downloads (5 GB); where CI=true, nobody watches.
QUIET  := $(if $(CI),--quiet)
PIP    := $(BIN)/python -m pip install $(QUIET) --disable-pip-version-check -c constraints.txt
# PESQ and Resemblyzer's voice detector come as source: they need a compiler, and Python's headers.
COMPILES := $(BIN)/python -c "import os, shutil, sys, sysconfig as s; \
	compiler = os.environ.get('CC') or s.get_config_var('CC') or 'cc'; \
	headers = os.path.join(s.get_path('include'), 'Python.h'); \
	sys.exit(not (shutil.which(compiler.split()[0]) and os.path.exists(headers)))"
# librosa's compiled functions are written to numba's cache by one process, before two can do it at once and crash (numba issue 10128).
WARM   := $(BIN)/python -c "import torch; from faces2voices.audio import pitch; pitch(torch.zeros(16000))"
# fairseq's last release does not import on Python 3.11. (PYENV_VERSION lets pyenv find its own; others pass it over.)
PYTHON310 ?= PYENV_VERSION=3.10 python3.10
FAIRSEQ   := .venv-fairseq
# The tensors are small: a second thread mostly waits for the first, and on a busy machine for a very long time.
export OMP_NUM_THREADS ?= 1
export PYTHONFAULTHANDLER := 1

.PHONY: demo test test-fairseq test-pythons test-browser lab readme site outputs prepare clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(META) | $(BIN)/python
	@echo "Installing faces2voices into $(VENV) (torch is large: 5 GB, a few minutes) ..."
	$(PIP) -e .
	@$(WARM)
	@touch $@

$(VENV)/.dev: $(META) | $(BIN)/python
	@echo "Installing faces2voices and its test tools into $(VENV) (torch is large: 5 GB, a few minutes) ..."
	@if $(COMPILES); then $(PIP) -e '.[dev,whisper,mos,judges]'; else $(PIP) -e '.[dev,whisper,mos]'; fi
	@$(WARM)
	@touch $@ $(VENV)/.package

demo: $(VENV)/.package
	$(BIN)/faces2voices synthesize data_samples/*.mp4 -o demo/$$(date +%Y%m%d-%H%M%S)

lab: $(VENV)/.dev
	$(BIN)/jupyter lab nbs/index.ipynb

test: $(VENV)/.dev
	@$(BIN)/python -c "import pesq, webrtcvad" 2>/dev/null || \
		echo "PESQ and Resemblyzer are not tested: no C compiler (with Python's headers) was found to build them."
	$(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest -q -rs tests

$(FAIRSEQ)/.ready: tests/fairseq/constraints.txt
	$(PYTHON310) -m venv $(FAIRSEQ)
	$(FAIRSEQ)/bin/python -m pip install --quiet --disable-pip-version-check 'pip<24.1'
	$(FAIRSEQ)/bin/python -m pip install --quiet --disable-pip-version-check -c $< fairseq sentencepiece python_speech_features scipy
	@touch $@

test-fairseq: $(FAIRSEQ)/.ready $(VENV)/.dev
	$(FAIRSEQ)/bin/python tests/fairseq/official.py $(FAIRSEQ)/files small base
	FAIRSEQ_FILES=$(FAIRSEQ)/files $(BIN)/python -m pytest -q tests/test_avhubert.py -k fairseq

test-pythons:
	$(PYTHON) tests/pythons.py

test-browser: $(VENV)/.dev
	$(BIN)/python tests/browser.py

readme: $(VENV)/.dev
	$(BIN)/python tests/make_readme.py
	$(BIN)/python tests/make_cards.py

# README.md is not touched.
site: $(VENV)/.dev
	$(BIN)/python tests/make_site.py

# Daily loop: edit a notebook, then this; commit notebooks and package together.
prepare: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tests/make_sidebar.py
	$(MAKE) readme

# Run every engine room and lesson again and store what it shows (the site is made from stored outputs).
outputs: $(VENV)/.dev
	$(BIN)/nbdev_export
	for nb in nbs/engine/*.ipynb nbs/*.ipynb; do $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=900 $$nb || exit 1; done
	$(MAKE) prepare

clean:
	rm -rf demo _docs _proc build *.egg-info
