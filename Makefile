# `make demo` trains, measures, exports and searches; `make test` runs lint, types, docs and the tests; `make quick`
# is the part of it without tests that take over a second or need the default LLM; `make test-lowest` runs some of the
# tests with the lowest versions that pyproject.toml allows; `make test-older` loads exports in sentence-transformers 5
# with transformers 4; `make test-vllm` serves exports by vLLM; `make docs` builds the guides into build/site.
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
OLDER := .venv-older/bin
VLLM := .venv-vllm/bin
CHECK_PYTHON := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# Tests run in PROCESSES processes of one thread each; a file stays in one of them, as its tests share models and
# runs. tests/conftest.py sorts files by their number of slow tests; xdist would sort them by their number of tests.
PROCESSES ?= 2
PYTEST := -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
quick-tests test test-lowest test-older test-vllm: export OMP_NUM_THREADS := 1

.PHONY: demo docs test quick quick-tests lint test-lowest test-older test-vllm install
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python $(PIP_INSTALL) -c constraints-lowest.txt -e '.[compare,gguf,mine,search,test]' \
		langchain-huggingface llama-index-embeddings-huggingface
	touch $@

.venv-older/installed: constraints-older.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-older
	$(OLDER)/python $(PIP_INSTALL) -r constraints-older.txt
	touch $@

.venv-vllm/installed: constraints-vllm.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python $(PIP_INSTALL) --no-deps -r constraints-vllm.txt
	touch $@

demo: install
	$(BIN)/anchorembed demo recipes/demo.yaml

docs: export NO_MKDOCS_2_WARNING := 1
docs: install
	$(BIN)/mkdocs build --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick: install # types take longest without a cache: beside the tests
	$(MAKE) --no-print-directory -j2 lint quick-tests

quick-tests: install
	$(BIN)/python $(PYTEST) -m 'not slow and not default_model' --limit 5

test: lint docs
	$(BIN)/python $(PYTEST) --durations=15

# torch is not at its floor here but the version of `make test`, so that one CPU build serves both environments.
LOW := test_recipe test_core system/test_files data/test_pairs data/test_documents data/test_beir \
	data/test_store model/test_embedder export/test_folder model/test_gguf model/test_packing \
	model/test_template model/test_tokens model/test_vectors search/test_index curate/test_mine \
	train/test_gradcache train/test_contrastive_losses train/test_reconstruct evaluate/test_statistics \
	export/test_verify export/test_card model/test_langchain model/test_llamaindex

test-lowest: .venv-lowest/installed
	$(LOWEST)/python $(PYTEST) -m 'not default_model' $(LOW:%=tests/%.py) tests/test_cli.py::test_show_config

# The main environment writes exports and their vectors, the older one, which has no AnchorEmbed, loads and compares.
test-older: install .venv-older/installed
	rm -rf .venv-older/exports
	$(BIN)/python tests/older/write_exports.py .venv-older/exports
	EXPORTS=.venv-older/exports $(OLDER)/python -m pytest -q -c /dev/null -p no:cacheprovider --rootdir tests/older \
		--confcutdir tests/older tests/older/check_exports.py

test-vllm: install .venv-vllm/installed
	VLLM=$(VLLM)/python $(BIN)/python -m pytest -n $(PROCESSES) --dist load tests/vllm/check_vllm.py
