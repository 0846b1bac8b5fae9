# expexp: the commands of the project. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 9999
ARGS ?=
MINUTES ?= 30
JOBS ?= 3
EXCEPT ?=

SHELL := /bin/sh
.SHELLFLAGS := -eu -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help run test check matrix matrix-venvs dist bench difference hostile host soak fuzz clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	echo
	echo "Variables: PYTHON=$(PYTHON) (any from 3.9), ARGS='...' (flags of expexp for run, of pytest for test, of the script for bench, difference, hostile, host and soak), JOBS=$(JOBS) (processes of test and matrix, 0: pytest alone)"

define python_is_new_enough
if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then
	echo "expexp needs Python 3.9 or newer, which '$(PYTHON)' is not." >&2
	echo "Name one that is, for example: make $@ PYTHON=python3.11" >&2
	exit 1
fi
endef

# Debian and Ubuntu keep venv and ensurepip in a package of their own.
define venv_is_installed
if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then
	install="install the Python modules venv and ensurepip"
	if command -v apt-get >/dev/null; then
		install="apt-get update -qq && apt-get install -qq -y python3-venv"
	elif command -v dnf >/dev/null; then
		install="dnf install -q -y python3-pip"
	fi
	if [ "$$(id -u)" != 0 ] || [ "$${install#install}" != "$$install" ]; then
		echo "'$(PYTHON)' lacks the modules venv and ensurepip; run as root: $$install" >&2
		exit 1
	fi
	echo "'$(PYTHON)' lacks the modules venv and ensurepip; running: $$install"
	if ! eval "$$install"; then
		echo "The modules venv and ensurepip are still missing; run as root: $$install" >&2
		exit 1
	fi
fi
endef

run: ## start expexp on PORT=9999 with expexp.yaml.example; needs only Python
	@$(python_is_new_enough)
	config=expexp.yaml.example
	if ! $(PYTHON) -c 'import yaml' 2>/dev/null; then
		config=contrib/example.json
		echo "PyYAML is not installed: starting the same modules from $$config"
	fi
	if [ "$(PORT)" != 9999 ]; then # the module self scrapes expexp's own port
		work=$$(mktemp -d)
		trap 'rm -rf "$$work"' EXIT INT TERM
		sed 's/\<9999\>/$(PORT)/' "$$config" > "$$work/$${config##*/}"
		config="$$work/$${config##*/}"
	fi
	echo "Starting expexp at http://localhost:$(PORT)/ with $$config (Ctrl-C ends it)"
	$(PYTHON) expexp.py -config "$$config" -web.listen-address ":$(PORT)" -log.level=info $(ARGS)

# What failed is run once more, alone; -rp names what passes then.
rerun := -rsp --last-failed --last-failed-no-failures=none

# Bytecode is always written: a process that finds none compiles the tests for eight seconds.
pytest := PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest

test: $(VENV)/.dev ## run the tests in JOBS=3 processes (ARGS='-k name' chooses some)
	@$(pytest) -p test_expexp -n $(JOBS) $(ARGS)

check: $(VENV)/.dev ## lint, format, types, and the gates of the two programs
	@bin="$(VENV)/bin"
	echo "ruff check" && $$bin/ruff check .
	echo "ruff format --check" && $$bin/ruff format --check .
	echo "mypy --strict" && $$bin/mypy --strict
	$$bin/mypy --strict bench/*.py
	echo "gates of expexp.py and contrib/expolint.py" && $$bin/python test_expexp.py

# Prints "3.9 /path/of/python3.9" for a CPython that we support, and nothing for any other.
describe_python := import sys; v = sys.version_info; \
	v >= (3, 9) and sys.implementation.name == "cpython" and print("3.%d" % v[1], sys.executable)

# Writes lines such as "3.9 /path/of/python3.9" into $$work/pythons, the oldest first, one a version.
define find_pythons
	{
		ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/python3 2>/dev/null || :
		minor=9
		while [ $$minor -le 50 ]; do command -v "python3.$$minor" || :; minor=$$((minor + 1)); done
		command -v $(PYTHON) || :
	} > "$$work/candidates"
	while read -r python; do
		"$$python" -c '$(describe_python)' < /dev/null 2>/dev/null || :
	done < "$$work/candidates" | awk '!seen[$$1]++' | sort -t . -k 2 -n > "$$work/pythons"
	if [ ! -s "$$work/pythons" ]; then echo "no Python from 3.9 found" >&2; exit 1; fi
endef

matrix: ## run the tests on the oldest and the newest Python from 3.9, the pure ones on those between
	@work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	$(find_pythons)
	ends="$$(sed -n '1p;$$p' "$$work/pythons")"
	run_tests() { # version, path, JOBS, and flags of pytest
		$(MAKE) test VENV=".venv-$$1" PYTHON="$$2" JOBS="$$3" \
			ARGS="-q -o cache_dir=$$work/cache-$$1 $$4" < /dev/null > "$$work/log" 2>&1
	}
	while read -r version python; do
		if [ "$$version" = "$(EXCEPT)" ]; then continue; fi
		chosen=pure
		case "$$ends" in *"$$version $$python"*) chosen="not peer and not load" ;; esac
		echo "Python $$version: $$python ($$chosen)"
		began=$$(date +%s)
		if run_tests "$$version" "$$python" $(JOBS) "-m '$$chosen' $(ARGS)"; then
			verdict=passed
		elif cat "$$work/log" && run_tests "$$version" "$$python" 0 "$(rerun)"; then
			verdict="passed at the second try, what had failed"
			sed -n "s/^PASSED /rerun on Python $$version: /p" "$$work/log"
		else
			verdict=FAILED
			touch "$$work/failed"
			cat "$$work/log"
		fi
		closing=$$(grep -E '^(=+ )?[0-9]+ .* in [0-9.]+s' "$$work/log" | tail -n 1 || :)
		printf 'Python %-5s %s: %s, with all else %s s\n' "$$version" "$$verdict" \
			"$${closing:-no tests were run}" $$(($$(date +%s) - began))
	done < "$$work/pythons"
	if [ -e "$$work/failed" ]; then exit 1; fi

matrix-venvs: # what matrix needs; .ci/run makes it while other steps run
	@work=$$(mktemp -d)
	trap 'rm -rf "$$work"' EXIT
	$(find_pythons)
	while read -r version python; do
		if [ "$$version" = "$(EXCEPT)" ]; then continue; fi
		$(MAKE) .venv-$$version/.dev VENV=.venv-$$version PYTHON="$$python" < /dev/null
	done < "$$work/pythons"

dist: ## build dist/: expexp.py with its revision, a package for Debian, SHA256SUMS
	@$(python_is_new_enough)
	PYTHON="$(PYTHON)" sh contrib/dist.sh

bench: $(VENV)/.dev ## measure the verifier, what silent clients cost, and expexp beside its peers
	@$(VENV)/bin/python bench/verify.py
	$(VENV)/bin/python bench/access.py
	$(VENV)/bin/python bench/compare.py $(ARGS)

difference: $(VENV)/.dev ## compare this expexp.py with the one before the rewrite of its HTTP code
	@$(VENV)/bin/python bench/difference.py $(ARGS)

hostile: $(VENV)/.dev ## attack this expexp.py on the loopback, and tell what does not hold
	@$(VENV)/bin/python bench/hostile.py $(ARGS)

host: $(VENV)/.dev ## put the host of this expexp.py in trouble, and tell what does not hold
	@$(VENV)/bin/python bench/host.py $(ARGS)

soak: $(VENV)/.dev ## let Prometheus scrape 300 modules for an hour while everything goes wrong
	@$(VENV)/bin/python bench/soak.py $(ARGS)

fuzz: $(VENV)/.dev ## hunt for faults of the verifier for MINUTES=30 (hypothesis)
	@rounds=$$(mktemp -d)
	trap 'rm -rf "$$rounds"' EXIT
	end=$$(($$(date +%s) + $(MINUTES) * 60))
	failed=0
	while [ $$failed = 0 ] && [ $$(date +%s) -lt $$end ]; do
		HYPOTHESIS_PROFILE=fuzz $(pytest) -q -s --timeout=0 -m hypothesis \
			$(ARGS) > "$$rounds/last" 2>&1 || failed=1
		grep '^examples tried: ' "$$rounds/last" >> "$$rounds/tried" || failed=1
	done
	if [ $$failed = 1 ]; then cat "$$rounds/last"; fi
	awk '{ sum += $$3 } END { print "examples tried: " sum + 0 }' "$$rounds/tried"
	exit $$failed

clean: ## remove virtual environments and caches
	@rm -rf .venv .venv-3.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	rm -rf __pycache__ bench/__pycache__ contrib/__pycache__ expexp.egg-info build dist

# The tools that pyproject.toml pins as its "dev" extra, one on each line.
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@printf 'Installing the test tools into $(VENV):'
	sed -n '/^dev = \[/,/^\]/s/^ *"\(.*\)",$$/\1/p' pyproject.toml > $(VENV)/dev-requirements.txt
	rm -f $(VENV)/pip-failed
	{
		$(VENV)/bin/python -m pip install --disable-pip-version-check -r $(VENV)/dev-requirements.txt ||
			touch $(VENV)/pip-failed
	} | while read -r word name rest; do
		if [ "$$word" = Collecting ]; then printf ' %s' "$${name%%[=<>!~;]*}"; fi
	done
	echo
	if [ -e $(VENV)/pip-failed ]; then
		echo "The test tools could not be installed: pip needs a package registry within reach" >&2
		echo "(PIP_INDEX_URL names another one). To run expexp, none is needed: make run" >&2
		exit 1
	fi
	touch $@

$(VENV)/bin/python:
	@$(python_is_new_enough)
	if [ ! -w . ]; then
		echo "The folder is not writable: copy the project to another one, or add VENV=/tmp/venv" >&2
		exit 1
	fi
	$(venv_is_installed)
	echo "Making the virtual environment $(VENV)"
	$(PYTHON) -m venv --clear $(VENV)
