# make demo: from nothing to pictures, and clips, of what the prompt says; again: goes on where it was stopped.
# make emoji: the same on pictures that nobody here drew: docs/real-pictures.md says what to download first.
# make test: the tests, and make test-processors: those that round, once for each instruction set.
# Each sets itself up. make clean: deletes all of it but emoji/.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo emoji test test-processors clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	.venv/bin/pip install --quiet --no-deps open_clip_torch==3.3.0 diffsynth==1.1.7  # for a vocabulary file in each
	touch $@

# a stage with a checkpoint goes on from it; a finished one says so
resume = $(if $(wildcard runs/$(1)-$(or $(2),shapes)/checkpoints/*/config.json),--resume)

demo: .venv/installed
	$(PY) train.py autoencoder $(call resume,autoencoder)
	$(PY) train.py image $(call resume,image)
	$(PY) sample.py --checkpoint runs/image-shapes --prompts demo.txt --grid --out runs/demo.png
	$(PY) evaluate.py --checkpoint runs/image-shapes --json runs/demo.json
	$(PY) train.py video $(call resume,video)
	$(PY) sample.py --checkpoint runs/video-shapes --frames 8 --lambda-m 1.3 --prompts demo_clips.txt --grid --zoom 2 --out runs/clips.gif
	$(PY) evaluate.py --video --checkpoint runs/video-shapes --json runs/clips.json

# on a GPU: make emoji RECIPE=emoji-gpu SIZE=128 COMPILE=--compile
RECIPE ?= emoji
SIZE ?= 64

emoji/train: | .venv/installed
	@ls emoji-datasource-*.tgz *-emoji-3d-*.tgz *-emoji-anim-*.tgz >/dev/null 2>&1 \
	  || { echo "download the packages first: docs/real-pictures.md says how"; exit 1; }
	$(PY) -m data.emoji emoji --size $(SIZE) $(wildcard *.tgz)

emoji: .venv/installed emoji/train
	$(PY) train.py autoencoder --recipe $(RECIPE) $(call resume,autoencoder,emoji)
	$(PY) train.py image --recipe $(RECIPE) $(COMPILE) $(call resume,image,emoji)
	$(PY) evaluate.py --checkpoint runs/image-emoji --prompts 300 --lambda-t 3 --steps 32 --sampler dpm --json runs/emoji.json
	$(PY) sample.py --checkpoint runs/image-emoji --prompts demo_emoji.txt --lambda-t 3 --steps 32 --sampler dpm --guide 0.6,1 --grid --out runs/emoji.png
	$(PY) train.py video --recipe $(RECIPE) $(COMPILE) $(call resume,video,emoji)
	$(PY) evaluate.py --video --checkpoint runs/video-emoji --lambda-t 3 --lambda-m 2 --steps 32 --sampler dpm --json runs/emoji-clips.json
	$(PY) sample.py --checkpoint runs/video-emoji --frames 8 --lambda-t 3 --lambda-m 2 --steps 32 --sampler dpm --prompts demo_emoji_clips.txt --grid --zoom 2 --out runs/emoji-clips.gif

# two tests at a time, of one thread each: few are large enough for more
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal tests --ignore tests/exercises

test-processors: .venv/installed-dev
	$(PY) tests/processors.py

clean:
	rm -rf .venv runs
