# Everything from a bare clone: `make demo` or `make test`. Both install into .venv first, and again only when the
# requirements change.

# The first of these that is a supported Python, and can make a virtual environment, makes it. PYTHON=... names another.
# learn2learn, which supplies the tasks, is for Python 3.11 and 3.12; on newer ones the package draws the same tasks itself.
PYTHON ?= python3.12 python3.11 python3 python3.13 python
# of make smoke: those that are absent are named
PYTHONS ?= python3.11 python3.12 python3.13 python3.14
VENV = .venv
PY = $(VENV)/bin/python
INSTALLED = $(VENV)/.installed

DEMO_ROOT = runs/demo
DEMO_FIT = fit --config maml.yaml --trainer.default_root_dir $(DEMO_ROOT) --checkpoint.dirpath $(DEMO_ROOT)/checkpoints
DEMO_TEST = test --ckpt_path $(DEMO_ROOT)/checkpoints/best.ckpt --trainer.default_root_dir $(DEMO_ROOT)

PYTEST_ARGS =
# of make test; each takes one thread and 2 GB
TEST_PROCESSES = 2

.DEFAULT_GOAL := help
.PHONY: help demo test smoke lint docs format clean same-python

help:
	@echo 'make demo    install, meta-train on the default data, test the best checkpoint'
	@echo 'make test    install, run the tests in two processes (PYTEST_ARGS="-m slow" for the slow ones)'
	@echo 'make smoke   install the wheel by plain pip in empty environments, fit and adapt: PYTHONS="..." (gigabytes each)'
	@echo 'make lint    install, check with ruff and mypy'
	@echo 'make docs    install, build the documentation site in build/site'
	@echo 'make format  install, let ruff mend what it can'
	@echo 'make clean   remove .venv and what builds and tools leave; runs/ stays'

demo: $(INSTALLED)
	$(call step,meta-train,$(PY) -m meta_lightning $(DEMO_FIT))
	$(call step,test the best checkpoint with 1 query per class,$(PY) -m meta_lightning $(DEMO_TEST) --data.queries 1)
	$(call step,test the best checkpoint with 15 queries per class,$(PY) -m meta_lightning $(DEMO_TEST) --data.queries 15)
	@echo
	@echo 'To look at the curves: $(VENV)/bin/tensorboard --logdir $(DEMO_ROOT), then open the address that it prints.'

test: $(INSTALLED)
	$(call step,run the tests in $(TEST_PROCESSES) processes,OMP_NUM_THREADS=1 \
	  $(PY) -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS))

smoke: $(INSTALLED)
	$(call step,check the wheel on $(PYTHONS),$(PY) tests/smoke.py $(PYTHONS))

lint: $(INSTALLED)
	$(call step,ruff check,$(PY) -m ruff check)
	$(call step,ruff format --check,$(PY) -m ruff format --check)
	$(call step,mypy,$(PY) -m mypy)

docs: $(INSTALLED)
	$(call step,build the site,NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet -f docs/site/mkdocs.yml)

format: $(INSTALLED)
	$(call step,ruff check --fix,$(PY) -m ruff check --fix)
	$(call step,ruff format,$(PY) -m ruff format)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(origin PYTHON),file)
$(INSTALLED): | same-python
endif

$(INSTALLED): requirements.txt setup.cfg pyproject.toml
	@$(make_venv)
	$(call step,look for a pip that knows build options,$(PY) -m pip install 'pip>=23.1')
	$(call step,install requirements.txt (PyTorch alone takes gigabytes),$(PY) -m pip install -r requirements.txt)
	$(call step,check that the installed packages fit together,$(PY) -m pip check)
	@touch $@

# A PYTHON named by hand is not passed over in silence for the one that already made the environment.
same-python:
	@[ -x $(PY) ] || exit 0; held=$$($(PY) -V 2>&1); named=$$($(PYTHON) -V 2>&1); \
	[ "$$held" = "$$named" ] || { \
	  echo "make: $(VENV) holds $$held, but PYTHON=$(PYTHON) is $$named:" >&2; \
	  echo 'run make clean first, or name another folder with VENV=...' >&2; exit 1; }

# $(call step,NAME,COMMAND) announces a step and, if it fails, says which one did.
define step
@echo '==> $(1)'
@$(2) || { status=$$?; \
  echo 'make: step "$(1)" failed (exit status '$$status'); the reason stands above. The command was:' >&2; \
  echo '  $(subst ','\'',$(2))' >&2; exit $$status; }
endef

# An environment that works and is a supported Python is kept; else one is made, or the reasons why not are given.
supported = import sys; print("%d.%d.%d" % sys.version_info[:3]); sys.exit(sys.version_info < (3, 11))
define make_venv
if $(PY) -c '$(supported)' >/dev/null 2>&1 && $(PY) -m pip --version >/dev/null 2>&1; then exit 0; fi; \
tried=; for python in $(PYTHON); do \
  if ! command -v "$$python" >/dev/null; then tried="$$tried  $$python: not found\n"; continue; fi; \
  if ! version=$$("$$python" -c '$(supported)' 2>&1); then \
    tried="$$tried  $$python: $$(printf '%s' "$$version" | head -n 1)\n"; continue; \
  fi; \
  if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
    tried="$$tried  $$python: $$version, but without venv and ensurepip (on Debian and Ubuntu: install python$${version%.*}-venv)\n"; continue; \
  fi; \
  echo "==> make $(VENV) with $$python ($$version)"; \
  "$$python" -m venv --clear $(VENV) && exit 0; \
  echo "make: step \"make $(VENV)\" failed; the reason stands above." >&2; exit 1; \
done; \
printf '%b' "make: step \"make $(VENV)\" failed: needs Python 3.11 or newer with venv. Looked for:\n$$tried" >&2; \
echo 'Name one with: make PYTHON=/path/to/python3.12' >&2; exit 1
endef
