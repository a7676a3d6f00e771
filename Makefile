# The two quickstarts and `make test` do everything on a fresh machine that has Python 3.10 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two threads on few shared cores spin: the tests' models are too small for them.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: help quickstart quickstart-video benchmark study test test-faults style fix-copies clean

help:
	@echo "make quickstart        align the embedded model with SSPO, print its scores, draw before and after"
	@echo "make quickstart-video  the same with clips: steady an embedded motion adapter that flickers"
	@echo "make benchmark         time of an update over that of the model's bare calls, and how it grows (15 minutes)"
	@echo "make study             the runs of examples/study/plan.md that are missing, then its tables and plots (hours)"
	@echo "make test              style and tests"
	@echo "make test-faults       the long tests of what happens when a run is killed, stopped or fed bad data"
	@echo "make fix-copies        rewrite the functions that the scripts share from train_sspo_sd.py"
	@echo "make clean             delete what the ones above made"

$(VENV)/installed: requirements.txt examples/requirements.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r examples/requirements.txt -r tests/requirements.txt
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

quickstart-video: $(VENV)/installed
	$(BIN)/python examples/quickstart_video.py

benchmark: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/benchmark.py

study: $(VENV)/installed
	$(BIN)/python examples/study/study.py run
	$(BIN)/python examples/study/study.py second
	$(BIN)/python examples/study/study.py later
	$(BIN)/python examples/study/study.py again
	test -e examples/study/gradients.json || $(BIN)/python examples/study/gradients.py
	$(BIN)/python examples/study/study.py report

test: style
	$(TEST_ENV) $(BIN)/python -m pytest -n auto

test-faults: $(VENV)/installed
	$(TEST_ENV) $(BIN)/python -m pytest -n auto -m long

style: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python utils/fix_copies.py --check

fix-copies: $(VENV)/installed
	$(BIN)/python utils/fix_copies.py

clean:
	rm -rf $(VENV) quickstart quickstart_video
