"""What `nestopt plugins new` writes, by kind: the module's code, its tests, and a use for the README.

`$name` is the plugin, `$registered` what it registers, `$cls` its class, `$module` and `$dist` the names of the module
and the distribution.
"""

from __future__ import annotations

from nestopt.plugins import templates_parts, templates_training

HOOKS = {**templates_parts.HOOKS, **templates_training.HOOKS}
"""By kind: the hook, the code, the imports of the tests, the tests, and a use for the README."""

KINDS = tuple(HOOKS)


PYPROJECT = """\
[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "$dist"
version = "0.1.0"
description = "$title for nestopt"
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["nestopt$extra>=$version", "torch"]

[project.optional-dependencies]
test = ["pytest>=8.2"]

[project.entry-points.nestopt]
$name = "$module"

[tool.setuptools]
py-modules = ["$module"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["."] # the tests also run before `pip install -e .`
"""

README = """\
# $dist

$title for [nestopt](https://pypi.org/project/nestopt).

```sh
pip install $dist
nestopt plugins
```

$use

To work on it:

```sh
pip install -e '.[test]'
pytest
nestopt plugins check $dist
```
"""

CI = """\
name: tests
on: [push, pull_request]
jobs:
  tests:
    runs-on: ubuntu-latest
    strategy:
      matrix:
        python: ["3.10", "3.13"]
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with: {python-version: "$${{ matrix.python }}"}
      - run: pip install torch --index-url https://download.pytorch.org/whl/cpu
      - run: pip install -e '.[test]'
      - run: pytest
      - run: nestopt plugins check $dist
"""

TESTS = '''\
"""$cls as its users meet it."""

import importlib.metadata

$imports
import $module


@pytest.fixture(autouse=True, scope="module")
def plugin():
    """The plugin as it is installed; before that, handed over."""
    if "$name" in [plugin.name for plugin in nestopt.registry.plugins()]:
        yield
        return
    nestopt.registry.add($module, "$name")
    yield
    nestopt.registry.remove("$name")


def test_it_is_found_by_its_entry_point():
    try:
        points = importlib.metadata.distribution("$dist").entry_points
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run pip install -e . first")
    assert [(point.name, point.value) for point in points if point.group == "nestopt"] == [("$name", "$module")]
    assert nestopt.registry.owner("$kind", "$registered") == "$name"

$tests'''
