# make run    answers a prompt with the embedded model
# make test   runs the tests
# make check  runs the linter, the type checker and the import rules
#
# Each makes its own .venv first, because the system Python of Debian, Ubuntu and macOS refuses
# global installs. A second run finds everything in place and starts at once.

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --editable
PROMPT := Tell me a short story about a fox.

# Says where the environment was made, if its Python still runs. One that was moved, or whose Python
# has gone, is made again.
PLACE := $(PYTHON) -c 'print(open("$(VENV)/place").read().strip())' 2>/dev/null
ifneq ($(shell $(PLACE)),$(CURDIR))
$(shell rm -f $(VENV)/*.stamp)
endif

.PHONY: run test check
run: $(VENV)/run.stamp
	$(VENV)/bin/ds4 generate "$(PROMPT)" --max-tokens 200

test: $(VENV)/test.stamp
	$(PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(VENV)/check.stamp
	$(PYTHON) tools/check

$(VENV)/run.stamp: pyproject.toml
	test "$$($(PLACE))" = "$(CURDIR)" || { python=$$(sh tools/find_python) \
	    && $$python -m venv --clear $(VENV) && echo "$(CURDIR)" > $(VENV)/place; }
	$(INSTALL) .
	touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(INSTALL) '.[test]'
	touch $@

$(VENV)/check.stamp: $(VENV)/test.stamp
	$(INSTALL) '.[lint]'
	touch $@
