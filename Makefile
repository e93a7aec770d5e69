# make repro   set up and reproduce the whole pipeline (about 15 minutes on two CPU cores)
# make test    set up and run the tests
# make lab     set up and open JupyterLab
# make photos DATA=folder   gallery and correlation study on photos in Flickr8k's layout
# make study   five seeds of CIM, three of each rival (some 40 minutes on two idle cores)
# make benchmarks   speed and memory, beside the public way of computing the reward (about half an hour)
# make wordnet   Debian's WordNet 3.0 in .wordnet, for cim evaluate (or have NLTK's)
# make smoke   every stage in a few minutes, in a folder of its own

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
# Nothing phones home, and nothing is downloaded behind the user's back.
export DO_NOT_TRACK = 1
export DVC_NO_ANALYTICS = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: repro test lab photos study smoke benchmarks wordnet lint data clean

SETUP := $(VENV)/.installed

$(SETUP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

data: $(SETUP)
	cim data

repro: data
	dvc repro

test: $(SETUP)
	pytest

lab: $(SETUP)
	jupyter lab notebooks

photos: $(SETUP)
	@test -n "$(DATA)" || { echo "error: say which folder, in Flickr8k's layout: make photos DATA=path/to/flickr8k"; exit 2; }
	cim pipeline runs/photos -S profile=photos -S "dataset.folder='$(abspath $(DATA))'" --stages dataset gallery correlation
	rm -rf results/photos && mkdir -p results && cp -r runs/photos/results/correlation results/photos

study: data
	cim pipeline runs/study -S profile=study --jobs 2
	rm -rf results/study && mkdir -p results/study/train
	cp runs/study/results/train/*.json results/study/train
	cp -r runs/study/results/captions runs/study/results/evaluate results/study
	cim run results

smoke: $(SETUP)
	cim pipeline runs/smoke -S profile=smoke

benchmarks: $(SETUP)
	python benchmarks/encoding.py
	python benchmarks/index.py
	python benchmarks/reward.py
	@test -d artifacts/gallery || { echo "error: benchmarks/grpo.py needs the pipeline's artifacts: run 'make repro'"; exit 2; }
	python benchmarks/grpo.py

wordnet: .wordnet/usr/share/wordnet/index.sense

.wordnet/usr/share/wordnet/index.sense:
	mkdir -p .wordnet
	cd .wordnet && apt-get download -q wordnet-base wordnet-sense-index && for file in *.deb; do dpkg-deb -x "$$file" .; done

lint: $(SETUP)
	ruff check .
	ruff format --check .

clean:
	rm -rf artifacts reports runs
