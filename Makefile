# make demo    set everything up and run the main job: tree against chain on agent rollouts
# make test    set everything up and run the tests
#
# Both make .venv once (python3 -m venv, pinned by constraints.txt), build csrc in place and are quick the second time.
# An environment that already has torch can be used instead: make test PYTHON=python

VENV   := .venv
STAMPS := .stamps

ifeq ($(origin PYTHON),undefined)
PY    := $(VENV)/bin/python
DEPS  := $(STAMPS)/venv
else
PY    := $(PYTHON)
DEPS  := $(STAMPS)/active
endif

BUILT   := $(STAMPS)/built-$(notdir $(DEPS))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

.PHONY: help setup programs test test-trl test-fla test-verl test-tritons demo bench bench-smoke lint format aot aot-newer ctest cuda docs doctor clean

help:
	@sed -n 's/^# //p' Makefile | head -5
	@echo "also: setup test-trl test-fla test-verl test-tritons bench bench-smoke lint format aot ctest cuda docs doctor clean"

setup: $(BUILT)

$(STAMPS)/venv: constraints.txt pyproject.toml
	@echo "== making $(VENV) and installing the pinned packages (torch is large: this takes minutes the first time)"
	@mkdir -p $(STAMPS)
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(PIP_FLAGS) -c constraints.txt setuptools wheel ninja packaging torch numpy
	@# a CUDA build of torch brings its own triton; the CPU build brings none
	$(VENV)/bin/python -c "import triton" 2>/dev/null || $(VENV)/bin/python -m pip install -q $(PIP_FLAGS) triton==3.6.0
	@touch $@

$(STAMPS)/active: pyproject.toml
	@mkdir -p $(STAMPS)
	@$(PY) -c "import torch; print('== using', '$(PY)', 'with torch', torch.__version__)" || \
	  { echo "PYTHON=$(PY) has no torch: install torch there, or run make without PYTHON to have a .venv made"; exit 1; }
	$(PY) -m pip install -q $(PIP_FLAGS) 'setuptools>=77' wheel ninja packaging
	@touch $@

# two halves that wait for different things: `make -j2 setup` does them at once
INSTALLED := $(STAMPS)/installed-$(notdir $(DEPS))
COMPILED  := $(STAMPS)/compiled-$(notdir $(DEPS))

$(INSTALLED): $(DEPS) setup.py pyproject.toml
	@echo "== installing treegrpo in place, with what tests and demo need"
	@# pip would build in a folder of its own, and `make cuda` all over again
	TREEGRPO_BUILD=none $(PY) -m pip install -q $(PIP_FLAGS) --no-build-isolation $(if $(findstring venv,$(DEPS)),-c constraints.txt,) -e '.[dev]'
	@touch $@

$(COMPILED): $(DEPS) $(SOURCES)
	@echo "== building csrc in place"
	$(PY) setup.py -q build_ext --inplace
	@touch $@

$(BUILT): $(INSTALLED) $(COMPILED)
	@$(PY) -c "from treegrpo_kernels import native; print('== cpu kernel:', native.cpu_info())"
	@touch $@

test: $(BUILT)
	@echo "== tests"
	$(PY) -m pytest tests -n auto --dist loadfile

# an environment of its own: TRL brings many packages the rest does not need
test-trl: $(BUILT)
	@echo "== TRL's GRPOTrainer against TreeGRPOTrainer"
	test -x .venv-trl/bin/python || python3 -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q $(PIP_FLAGS) -c constraints.txt torch numpy 'trl==1.16.*' requests peft bm25s pytest pytest-benchmark hypothesis
	.venv-trl/bin/python -m pytest tests/test_trl*.py
	.venv-trl/bin/python -m pytest tests/test_other_device.py -k trl
	TREEGRPO_DOCS=trl .venv-trl/bin/python -m pytest tests/test_docs.py::test_block

# in a folder of its own: where it is installed, transformers calls it without a GPU, too
test-fla: $(BUILT)
	@echo "== flash-linear-attention's kernels, level by level, in Triton's interpreter"
	test -d .fla || $(PY) -m pip install -q $(PIP_FLAGS) --no-deps --target .fla 'fla-core==0.6.0' einops
	PYTHONPATH=.fla TRITON_INTERPRET=1 $(PY) -m pytest tests/test_fla.py

# likewise, and verl wants an older transformers
test-verl: $(BUILT)
	@echo "== verl's FSDP engine against TreeFSDPEngine"
	test -x .venv-verl/bin/python || python3 -m venv .venv-verl
	grep -v '^transformers' constraints.txt > $(STAMPS)/verl-constraints.txt
	.venv-verl/bin/python -m pip install -q $(PIP_FLAGS) -c $(STAMPS)/verl-constraints.txt torch numpy 'verl==0.9.1' TransferQueue uvicorn fastapi cachetools \
	  pytest hypothesis
	.venv-verl/bin/python -m pytest tests/test_verl.py tests/test_verl_trainer.py tests/test_verl_run.py
	TREEGRPO_DOCS=verl .venv-verl/bin/python -m pytest tests/test_docs.py::test_block

demo: $(BUILT)
	@echo "== demo: a forest of agent rollouts, trained as a tree and as chains"
	$(PY) -m treegrpo demo

bench: $(BUILT)
	$(PY) -m pytest bench --benchmark-json=$(STAMPS)/bench.json

bench-smoke: $(BUILT)
	@echo "== bench smoke: every bench once, nothing timed"
	$(PY) -m pytest bench --benchmark-disable -q

lint: $(BUILT)
	@echo "== lint"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(BUILT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

aot: $(BUILT)
	@echo "== Triton kernels compiled ahead of time for sm_80, sm_90, sm_100 and sm_120: no spills, shared memory within limits"
	TRITON_INTERPRET= $(PY) -m treegrpo_kernels.triton.aot $(AOT_FLAGS)
	TRITON_INTERPRET= $(PY) -m treegrpo_kernels.triton.aot --arch 90 --head-dim 256 --dtype bf16

# a part of what `make aot` compiles without flags
aot-newer: $(BUILT)
	TRITON_INTERPRET= $(PY) -m treegrpo_kernels.triton.aot --arch 100 120 --head-dim 128

# the kernels and their launches with other releases of Triton, each before the environment's own
TRITONS := 3.7.1 3.8.0 3.9.0
test-tritons: $(BUILT)
	for release in $(TRITONS); do \
	  echo "== Triton $$release"; folder=$(CURDIR)/.triton/$$release; \
	  test -d $$folder || $(PY) -m pip install -q $(PIP_FLAGS) --no-deps --target $$folder triton==$$release || exit 1; \
	  PYTHONPATH=$$folder TRITON_INTERPRET= $(PY) -m treegrpo_kernels.triton.aot || exit 1; \
	  PYTHONPATH=$$folder TRITON_INTERPRET= $(PY) -m treegrpo_kernels.triton.aot --arch 90 --head-dim 256 --dtype bf16 || exit 1; \
	  PYTHONPATH=$$folder $(PY) -m pytest -q tests/test_prepared.py tests/test_hopper.py tests/test_hopper_emulated.py tests/test_triton.py || exit 1; \
	done

programs:
	@echo "== csrc without torch, by CMake"
	cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release
	cmake --build build/cmake --parallel

ctest: $(BUILT) programs
	@echo "== csrc without torch: ctest"
	ctest --test-dir build/cmake --output-on-failure
	$(PY) -m pytest tests/test_imitated.py -q

cuda: $(BUILT)
	@echo "== CUDA objects by nvcc, no GPU needed"
	TREEGRPO_BUILD=cuda $(PY) setup.py build_ext --inplace
	$(PY) csrc/cuda/check_spills.py

docs: $(BUILT)
	@echo "== API reference from docstrings, into build/docs"
	$(PY) docs/api.py

doctor: $(BUILT)
	$(PY) -m treegrpo doctor

clean:
	rm -rf $(STAMPS) build *.egg-info kernels/*.egg-info kernels/treegrpo_kernels/*.so
