# make demo: from nothing to pictures, and clips, of what the prompt says; again: goes on where it was stopped.
# make test: the tests, and make test-processors: those that round, once for each instruction set.
# Each sets itself up. make clean: deletes all of it.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test test-processors clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	.venv/bin/pip install --quiet --no-deps open_clip_torch==3.3.0 diffsynth==1.1.7  # for a vocabulary file in each
	touch $@

# a stage with a checkpoint goes on from it; a finished one says so
resume = $(if $(wildcard runs/$(1)-shapes/checkpoints/*/config.json),--resume)

demo: .venv/installed
	$(PY) train.py autoencoder $(call resume,autoencoder)
	$(PY) train.py image $(call resume,image)
	$(PY) sample.py --checkpoint runs/image-shapes --prompts demo.txt --grid --out runs/demo.png
	$(PY) evaluate.py --checkpoint runs/image-shapes --json runs/demo.json
	$(PY) train.py video $(call resume,video)
	$(PY) sample.py --checkpoint runs/video-shapes --frames 8 --lambda-m 1.3 --prompts demo_clips.txt --grid --zoom 2 --out runs/clips.gif
	$(PY) evaluate.py --video --checkpoint runs/video-shapes --json runs/clips.json

# two tests at a time, of one thread each: few are large enough for more
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal tests

test-processors: .venv/installed-dev
	$(PY) tests/processors.py

clean:
	rm -rf .venv runs
