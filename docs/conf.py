"""Sphinx configuration. The site builds, and reads, without a network."""

from __future__ import annotations

import builtins
import json
import os
import pydoc
import re
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import nestopt
from nestopt.config import schema

project = "nestopt"
author = "The nestopt authors"
project_copyright = author
release = version = nestopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "_static", "api/modules.rst"]

html_theme = "furo"
html_title = f"nestopt {release}"
html_static_path = ["_static"]
html_css_files = ["nestopt.css"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

mathjax_path = "mathjax/tex-svg-full.js"

# -- the reference, from docstrings --------------------------------------------------------------------------------

apidoc_modules = [
    {
        "path": "../nestopt",
        "destination": "api",
        "exclude_patterns": ["**/__main__.py"],  # importing it would run the command line
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance", "undoc-members"},
    }
]
# Each object is described once, where it is defined; `resolve_public_name` leads its shorter public names there.
autodoc_default_options = {"ignore-module-all": True, "exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# In docstrings a single backtick marks code, $…$ and $$…$$ mathematics, as in the MyST pages.
default_role = "code"
DISPLAY_MATH = re.compile(r"^([ \t]*)\$\$(.+?)\$\$[ \t]*$", re.MULTILINE | re.DOTALL)
DOLLAR_MATH = re.compile(r"(?<![\\$`\w])\$(?=[^\s$])([^$`]*?[^\s$`\\])\$(?![\w$`])")

# -- cross-references: every one is checked, except into other projects --------------------------------------------

nitpicky = True
LIBRARIES = (
    "annotated_types",
    "dist",
    "numpy",
    "np",
    "pluggy",
    "pydantic",
    "pydantic_core",
    "safetensors",
    "torch",
    "transformers",
    "nn",
    "yaml",
)
nitpick_ignore_regex = [
    (r"py:.*", r"(nestopt\..*\.)?_\w+"),  # a private alias or type variable, shown in a signature
    (r"py:.*", rf"({'|'.join((*LIBRARIES, *sys.stdlib_module_names))})(\..*)?"),
    (r"py:.*", rf"({'|'.join(dir(builtins))})"),
    (r"py:.*", r"(Any|Callable|ClassVar|DeviceMesh|Iterable|Iterator|Literal|Mapping|Module|Path|Sequence|Tensor)"),
    # names of our own type aliases and validators, which the fields of a schema show as they are written
    (
        r"py:class",
        r"(Accept|Shape|BeforeValidator|Bool|Bytes|[A-Z][a-z]+Spec|Field|FilePath|Fill|Finite|OnNonfinite|Precision|Whole|_rest|no_bool)",
    ),
]

# -- examples ------------------------------------------------------------------------------------------------------

doctest_test_doctest_blocks = ""  # pytest runs the docstrings' examples; this builder runs `{doctest}` in pages
doctest_global_setup = """
import torch
import nestopt
torch.manual_seed(0)
"""


MEASURED = (
    ("levels", "trajectories"),
    ("levels", "level_table"),
    ("tokens", "recall"),
    ("tokens", "token_table"),
    ("tokens", "continua"),
)
"""Scripts of `figures`, and whose pages they are for."""


def prepare_docstring(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Turn `$x$` and `$$x$$` into mathematics; keep napoleon from reading "Words: more" of an attribute as a type."""
    if what in {"attribute", "data", "property"} and lines:
        lines[:1] = lines[0].replace(": ", ":\n").split("\n")  # a type needs a description on its own line
    text = DISPLAY_MATH.sub(lambda match: f"{match[1]}.. math:: {' '.join(match[2].split())}", "\n".join(lines))
    text = DOLLAR_MATH.sub(lambda match: f":math:`{' '.join(match[1].split())}`", text)
    lines[:] = text.split("\n")


def write_keys(app: Sphinx) -> None:
    """Tables of the keys of configurations, which the page on them includes, from the schema."""
    folder = Path(app.srcdir, "api")
    folder.mkdir(exist_ok=True)
    for section in (schema.ModelConfig, schema.OptimizerConfig, schema.DataConfig, schema.TrainConfig):
        _write_table(section, section().model_dump(), folder)
    _write_table(schema.RestConfig, schema.RestConfig().model_dump(), folder)
    _write_table(schema.GroupConfig, dict.fromkeys(schema.GroupConfig.model_fields), folder)


def write_limits(app: Sphinx) -> None:
    """The table of what layers and optimizers may do, from the file that the tests hold them to."""
    limits = json.loads(Path(app.srcdir).parent.joinpath("tests/accelerator/limits.json").read_text(encoding="utf-8"))
    held = {**limits["layers"], **{stack: {"a step": own} for stack, own in limits["optimizers"].items()}}
    rows = ["| | | launches | bytes | FLOPs |", "| --- | --- | ---: | ---: | ---: |"]
    for name, modes in held.items():
        for mode, own in modes.items():
            flops = ", ".join(f"{n:,.0f} {key.removesuffix(' FLOPs')}" for key, n in own.items() if "FLOPs" in key)
            rows.append(f"| `{name}` | {mode} | {own['launches']:,.0f} | {own['bytes']:,.0f} | {flops or 0} |")
    Path(app.srcdir, "api", "limits.inc").write_text("\n".join(rows) + "\n", encoding="utf-8")


def measure_levels(app: Sphinx) -> None:
    """The pictures and tables of the pages on levels: a minute, and so only if code has changed since the last."""
    root, figures = Path(app.srcdir).parent, Path(app.srcdir, "figures")
    for folder, name in MEASURED:
        script, stamp = figures / f"{name}.py", Path(app.srcdir, folder, "made", f".{name}")
        code = [*figures.glob("*.py"), *(root / "nestopt").rglob("*.py")]
        if not stamp.exists() or stamp.stat().st_mtime < max(file.stat().st_mtime for file in code):
            begun = time.time()
            runpy.run_path(str(script))["main"]()
            stamp.touch()
            os.utime(stamp, (begun, begun))  # what was changed meanwhile may not have been seen


def _write_table(section: type[schema.Section], defaults: dict[str, Any], folder: Path) -> None:
    rows = ["| key | default | what it is |", "| --- | --- | --- |"]
    for key, field in section.model_fields.items():
        default = yaml.safe_dump(defaults[key], default_flow_style=True, width=1000).removesuffix("...\n").strip()
        shown = "must be given" if field.is_required() else f"`{default}`"
        rows.append(f"| `{key}` | {shown} | {field.description} |")
    name = section.__name__.removesuffix("Config").lower()
    (folder / f"keys-{name}.inc").write_text("\n".join(rows) + "\n", encoding="utf-8")


def describe_fields(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Show what the schema says about the keys of a section of a configuration."""
    if isinstance(obj, type) and issubclass(obj, schema.Section) and obj.model_fields:
        # a list, not "Args:", which would show each key's type with all its validators
        lines += ["", *(f"* `{key}`: {field.description}" for key, field in obj.model_fields.items()), ""]


def resolve_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element) -> Element | None:
    """Lead `nestopt.Level` to `nestopt.core.level.Level`, where it is defined and described."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("nestopt."):
        return None
    found = pydoc.locate(target)
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    if not home.startswith("nestopt.") or home == target:
        return None
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], home, node, contnode)


def setup(app: Sphinx) -> None:
    """Connect the hooks above."""
    app.connect("builder-inited", write_keys)
    app.connect("builder-inited", write_limits)
    app.connect("builder-inited", measure_levels)
    app.connect("autodoc-process-docstring", describe_fields, priority=300)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon's 500
    app.connect("missing-reference", resolve_public_name)
