# make run    answers a prompt with the embedded model
# make test   runs the tests
# make check  runs the linter, the type checker and the import rules
#
# Each makes its own .venv first, because the system Python of Debian, Ubuntu and macOS refuses
# global installs. A second run finds everything in place and starts at once.

VENV := .venv
PYTHON := $(VENV)/bin/python
PROMPT := Tell me a short story about a fox.

# An environment whose Python has gone (an upgrade, a moved folder) is made again.
ifneq ($(shell $(PYTHON) -c 'import sys; print(sys.prefix)' 2>/dev/null),$(CURDIR)/$(VENV))
$(shell rm -f $(VENV)/*.stamp)
endif

.PHONY: run test check
run: $(VENV)/run.stamp
	$(VENV)/bin/ds4 generate "$(PROMPT)" --max-tokens 200

test: $(VENV)/test.stamp
	$(PYTHON) -m pytest

check: $(VENV)/check.stamp
	$(PYTHON) tools/check

$(VENV)/run.stamp: pyproject.toml
	python=$$(sh tools/find_python) && $$python -m venv --clear $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/check.stamp: $(VENV)/test.stamp
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[lint]'
	touch $@
