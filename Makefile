# make repro       set up and reproduce the whole pipeline (10 to 30 minutes on two CPU cores)
# make test        set up and run all tests; make test-fast leaves out what trains, runs stages or starts processes
# make lab         set up and open JupyterLab on the notebooks
# make site        the executed notebooks as web pages in site/
# make photos DATA=folder   Flickr8k: the reward against people's judgements (a quarter of an hour)
# make photos-train DATA=folder   Flickr8k: a captioner for photos, trained with the published and the calibrated reward (2 hours)
#   both take further settings: SETTINGS="-S evaluate.identification=$PWD/folder"
# make study       five seeds of CIM, three of each rival (about 35 minutes)
# make labels      SFT by the number, thoroughness and errors of its labels, against CIM without labels
# make ablation    settings of the reward and text towers of its rivals, as scores and as rewards
# make weak        training from a weak base model, with guards and without
# make smoke       every stage on a small scale, in a folder of its own (a few minutes)
# make benchmarks  speed and memory, beside the public way of computing the reward (about half an hour)
# make wordnet     Debian's WordNet 3.0 in .wordnet, for cim evaluate (or have NLTK's)
# make chromium    Debian's Chromium, for the browser tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
# Nothing sends usage data, and nothing is downloaded unasked.
export DO_NOT_TRACK = 1
export DVC_NO_ANALYTICS = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
# Else each of many processes would compile PyTorch's and transformers' modules again.
unexport PYTHONDONTWRITEBYTECODE
# glibc would give the memory of every tensor back to the system and fetch it again for the next one.
export MALLOC_MMAP_THRESHOLD_ = 8589934592
export MALLOC_TRIM_THRESHOLD_ = 8589934592
# Two test processes of one thread each are faster than one of two.
WORKERS ?= 2

.PHONY: repro test test-fast lab site photos photos-train study labels ablation weak smoke benchmarks wordnet chromium lint data clean

SETUP := $(VENV)/.installed
TESTS := OMP_NUM_THREADS=1 pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Unpacking takes most of the time, so two processes share it, each with every second package; the lock is complete, so
# nothing needs resolving. Modules are compiled when they are first imported; compiling all of them would double the time.
INSTALL := $(BIN)/python -m pip install --no-deps --no-warn-conflicts --no-compile --quiet --disable-pip-version-check
$(SETUP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	awk 'NR % 2' requirements.lock > $(VENV)/odd.txt
	awk 'NR % 2 == 0' requirements.lock > $(VENV)/even.txt
	$(INSTALL) -r $(VENV)/odd.txt & odd=$$!; $(INSTALL) -r $(VENV)/even.txt; even=$$?; wait $$odd && exit $$even
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

data: $(SETUP)
	cim data

repro: data
	dvc repro

test: $(SETUP)
	$(TESTS)

test-fast: $(SETUP)
	$(TESTS) -m "not slow"

lab: $(SETUP)
	jupyter lab --config=conf/jupyter_lab_config.py notebooks

site: data
	dvc repro site

photos: RUN = flickr8k-judgements judgements correlation -S captioner=none
photos-train: RUN = flickr8k correlation samples evaluate
photos photos-train: wordnet
# The folder of photos where it has the name of the published archive.
photos photos-train: PHOTOS = $(patsubst %,-S "dataset.images='%'",$(abspath $(wildcard $(DATA)/Flicker8k_Dataset)))

photos photos-train: $(SETUP)
	@test -n "$(DATA)" || { echo "error: name the folder of Flickr8k: make $@ DATA=path/to/flickr8k"; exit 2; }
	cim pipeline runs/$(RUN) -S profile=flickr8k -S "dataset.folder='$(abspath $(DATA))'" $(PHOTOS) $(SETTINGS) --publish results/$(firstword $(RUN))

study: $(SETUP)
	cim pipeline runs/study evaluate -S profile=study --publish results/study

labels: $(SETUP)
	cim pipeline runs/labels labels -S profile=labels --publish results/labels-study

ablation: $(SETUP)
	cim pipeline runs/ablation ablation samples -S profile=ablation --publish results/ablation-study

weak: $(SETUP)
	cim pipeline runs/weak ablation -S profile=weak --publish results/weak-study

smoke: $(SETUP)
	cim pipeline runs/smoke -S profile=smoke

benchmarks: $(SETUP)
	python benchmarks/encoding.py
	python benchmarks/index.py
	python benchmarks/reward.py
	@test -d artifacts/gallery || { echo "error: benchmarks/grpo.py needs the pipeline's artifacts: run 'make repro'"; exit 2; }
	python benchmarks/grpo.py

WORDNET := apt-get download -q wordnet-base wordnet-sense-index

wordnet: .wordnet/usr/share/wordnet/index.sense

.wordnet/usr/share/wordnet/index.sense:
	mkdir -p .wordnet
	cd .wordnet && { $(WORDNET) || { apt-get update -q && $(WORDNET); }; } && for file in *.deb; do dpkg-deb -x "$$file" .; done

chromium:
	command -v chromium >/dev/null || { apt-get update -q && apt-get install -qy chromium chromium-driver; }

lint: $(SETUP)
	ruff check .
	ruff format --check .

clean:
	rm -rf artifacts reports runs site
