# make demo   install, then alanine dipeptide from all atoms to the report
# make test   install, then all tests
# make bench  install, then the benchmarks of speed
# EXTRAS=cuda12 (or cuda13) adds OpenMM's and openmmtorch's CUDA platforms.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?=
DEMO   ?= runs/demo
comma  := ,
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed-$(if $(EXTRAS),$(subst $(comma),-,$(EXTRAS)),cpu)

.PHONY: install demo test bench lint clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "openmm-hvpcg needs Python 3.11 to 3.13, got %d.%d: make install PYTHON=python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet setuptools wheel
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet -e ".[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]"
	touch $(STAMP)

demo: install
	$(BIN)/openmm-hvpcg run protocols/alanine_dipeptide/protocol.yaml --out $(DEMO)

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Speed of each stage beside its floor; see benchmarks/README.md. Some minutes, on a machine with nothing else to do.
bench: install
	for name in labels training production demo; do \
		$(BIN)/python benchmarks/$$name.py --out benchmarks/results/$$name.json || exit 1; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
