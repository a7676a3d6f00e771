# The quickstarts and `make test` do everything on a fresh machine that has Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICKSTART := examples/quickstart
BENCHMARK := examples/benchmark
STUDY := examples/study
# Two threads on few shared cores spin: the tests' models are too small for them.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: help quickstart quickstart-video quickstart-flux2 quickstart-wan benchmark study test test-faults test-gpu style fix-copies clean

help:
	@echo "make quickstart        align the embedded model with SSPO, print its scores, draw before and after"
	@echo "make quickstart-video  the same with clips: steady an embedded motion adapter that flickers"
	@echo "make quickstart-flux2  the same with a flow model: align a small pipeline in the layout of FLUX.2 [klein]"
	@echo "make quickstart-wan    clips by a flow model: steady a small pipeline in the layout of Wan 2.1 that flickers"
	@echo "make benchmark         time of an update over that of the model's bare calls, and how it grows (15 minutes)"
	@echo "make study             the studies' runs that are missing, then their tables and plots (days)"
	@echo "make test              style and tests"
	@echo "make test-faults       the long tests of what happens when a run is killed, stopped or fed bad data"
	@echo "make test-gpu          what the scripts do on this machine's GPU: half an hour, a report to send us"
	@echo "make style             ruff, and whether the scripts' shared functions are still the same"
	@echo "make fix-copies        rewrite the functions that the scripts share from where they come from"
	@echo "make clean             delete the virtual environment and what the quickstarts left"

$(VENV)/installed: requirements.txt $(QUICKSTART)/requirements.txt tests/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -r $(QUICKSTART)/requirements.txt -r tests/requirements.txt
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python $(QUICKSTART)/quickstart.py

quickstart-video: $(VENV)/installed
	$(BIN)/python $(QUICKSTART)/quickstart_video.py

quickstart-flux2: $(VENV)/installed
	$(BIN)/python $(QUICKSTART)/quickstart_flux2.py

quickstart-wan: $(VENV)/installed
	$(BIN)/python $(QUICKSTART)/quickstart_wan.py

benchmark: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python $(BENCHMARK)/benchmark.py

study: $(VENV)/installed
	$(BIN)/python $(STUDY)/study.py run
	$(BIN)/python $(STUDY)/study.py second
	$(BIN)/python $(STUDY)/study.py later
	$(BIN)/python $(STUDY)/study.py again
	test -e $(STUDY)/gradients.json || $(BIN)/python $(STUDY)/gradients.py
	$(BIN)/python $(STUDY)/study.py report
	$(BIN)/python $(STUDY)/second.py run
	$(BIN)/python $(STUDY)/second_report.py report

test: style
	$(TEST_ENV) $(BIN)/python -m pytest -n auto

test-faults: $(VENV)/installed
	$(TEST_ENV) $(BIN)/python -m pytest -n auto -m long

test-gpu: $(VENV)/installed
	$(BIN)/python tests/gpu/report.py

style: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python utils/fix_copies.py --check

fix-copies: $(VENV)/installed
	$(BIN)/python utils/fix_copies.py

clean:
	rm -rf $(VENV) quickstart quickstart_video quickstart_flux2 quickstart_wan gpu-report.md
