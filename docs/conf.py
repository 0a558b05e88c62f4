"""Sphinx configuration. The site builds, and reads, without a network."""

from __future__ import annotations

import builtins
import html
import importlib
import inspect
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
from docutils import nodes
from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer

import nestopt
from nestopt.config import schema

project = "nestopt"
author = "The nestopt authors"
project_copyright = author
release = version = nestopt.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_static"]

html_theme = "furo"
html_title = f"nestopt {release}"
html_logo = html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["nestopt.css"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Tutorials are notebooks: they run as the site is built, and a cell that raises fails it.
TRIES_EXAMPLES = tags.has("doctest")  # type: ignore[name-defined]  # noqa: F821
nb_execution_mode = "off" if TRIES_EXAMPLES else "auto"
suppress_warnings = ["myst-nb.lexer"] if TRIES_EXAMPLES else []  # cells that did not run are in no language
nb_execution_timeout = 900
os.environ["OMP_NUM_THREADS"] = "1"  # of their kernels: small tensors, and threads that wait for others' turns are slow
nb_execution_raise_on_error = True
nb_execution_show_tb = True

mathjax_path = "mathjax/tex-svg-full.js"

# -- the reference, from docstrings --------------------------------------------------------------------------------

PUBLIC = (
    "nestopt",
    "nestopt.optim",
    "nestopt.nn",
    "nestopt.models",
    "nestopt.ops",
    "nestopt.levels",
    "nestopt.parts",
    "nestopt.core",
    "nestopt.config",
    "nestopt.evidence",
    "nestopt.testing",
    "nestopt.train.data",
)
"""Packages whose names are described, each on its page of `reference`; a name of several is led to the first."""
HOMES: dict[str, str] = {}
"""Where a public name was defined, and the name."""
CLASSES: dict[str, str] = {}
"""Classes by the bare name that docstrings give them, and where they were defined."""

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

# -- cross-references: every one is checked ------------------------------------------------------------------------

# Other projects' names are kept here, as inventories of version 1, which are plain text: no build needs a network.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.txt"),
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.txt"),
    "numpy": ("https://numpy.org/doc/stable", "inventories/numpy.txt"),
}

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
        r"(Accept|Shape|BeforeValidator|Bool|Bytes|[A-Z][a-z]+Spec|Field|FilePath|Fill|Finite|FormSetting|OnNonfinite|Precision|Scale|Sharded|Start|Whole|_rest|no_bool|memory|objective)",
    ),
]

ELSEWHERE = {
    "DeviceMesh": "torch.distributed.device_mesh.DeviceMesh",
    "Module": "torch.nn.Module",
    "Tensor": "torch.Tensor",
    "nn.Module": "torch.nn.Module",
    "torch.distributed.distributed_c10d.ProcessGroup": "torch.distributed.ProcessGroup",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
    **{name: f"collections.abc.{name}" for name in ("Callable", "Iterable", "Iterator", "Mapping", "Sequence")},
    **{name: f"typing.{name}" for name in ("Any", "ClassVar", "Literal")},
    "Path": "pathlib.Path",
}
"""Other projects' names as they stand in signatures, and as their pages call them."""

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
    ("tokens", "trained"),
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


def write_gallery(app: Sphinx) -> None:
    """A card for each page of a level: its picture, and the first sentence that it says."""
    root = Path(app.srcdir)
    for folder in ("levels", "tokens"):
        cards = []
        for page in sorted(root.joinpath(folder).glob("*.md")):
            head, _, rest = page.read_text(encoding="utf-8").partition("\n\n")
            if page.stem != "index" and root.joinpath(folder, "made", f"{page.stem}.svg").exists():
                says = re.split(r"(?<=[.:])\s", " ".join(rest.partition("\n\n")[0].split()))[0].rstrip(":.")
                says = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", says)  # a link would lead from the page that it stands on
                title = head.removeprefix("# ")
                cards.append(
                    f"```{{figure}} {folder}/made/{page.stem}.svg\n:alt: {title.replace('`', '')}\n:target: "
                    f"{folder}/{page.stem}.html\n\n[{title}]({folder}/{page.stem}.md): {says}.\n```\n"
                )
        gallery = "\n".join([":::{container} gallery", *cards, ":::"])
        root.joinpath("api", f"gallery-{folder}.inc").write_text(gallery, encoding="utf-8")


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


def find_homes(app: Sphinx) -> None:
    """Note where each public name was defined."""
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            if not inspect.ismodule(thing := getattr(module, name)):
                HOMES.setdefault(_home(thing), f"{package}.{name}")
    for module in [module for name, module in sys.modules.items() if name.startswith("nestopt.")]:
        found = [thing for thing in vars(module).values() if inspect.isclass(thing)]
        CLASSES.update({thing.__name__: _home(thing) for thing in found if thing.__module__.startswith("nestopt.")})


def _home(thing: object) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def write_levels(app: Sphinx) -> None:
    """The reference of levels: names of `nestopt.levels` are not those of their classes, which autodoc goes by."""
    lines = [".. py:module:: nestopt.levels", ""]
    for name in nestopt.levels.__all__:
        level = getattr(nestopt.levels, name)
        fields = inspect.signature(level).parameters.values()
        shown = inspect.Signature([field.replace(annotation=inspect.Parameter.empty) for field in fields])
        text = inspect.getdoc(level).split("\n")
        prepare_docstring(app, "class", name, level, None, text)
        described = GoogleDocstring(text, app.config, app, "class").lines()
        lines += [f".. py:class:: {name}{shown}", "", *(f"   {line}" for line in described), ""]
    folder = Path(app.srcdir, "api")
    folder.mkdir(exist_ok=True)
    (folder / "levels.inc").write_text("\n".join(lines), encoding="utf-8")


def resolve_home(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element) -> Element | None:
    """Lead `nestopt.core.level.Level` to `nestopt.Level`, its public name; show what has none as it is written."""
    node["reftarget"] = ELSEWHERE.get(node["reftarget"], node["reftarget"])  # for intersphinx, which comes next
    target = CLASSES.get(node["reftarget"], node["reftarget"])
    if node.get("refdomain") != "py" or not target.startswith("nestopt."):
        return None
    owner, found, rest = target, pydoc.locate(target), ""
    while owner.count(".") and (found is None or _home(found) not in HOMES):
        owner, _, last = owner.rpartition(".")
        found, rest = pydoc.locate(owner), f".{last}{rest}"
    if not owner.count("."):
        return contnode if pydoc.locate(target) is not None else None  # it is there, and is nobody's business
    domain = env.domains.python_domain
    public = HOMES[_home(found)] + rest
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], public, node, contnode) or contnode


def add_public_names(app: Sphinx, module: str) -> tuple[str, dict[str, Any]] | None:
    """Let levels be found in the source of their classes by the names that they have."""
    if not module.startswith("nestopt."):
        return None
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.find_tags()
    tags = dict(analyzer.tags)
    for home, public in HOMES.items():
        if public.startswith("nestopt.levels.") and home.rpartition(".")[0] == module:
            tags[public.rpartition(".")[2]] = tags[home.rpartition(".")[2]]
    return analyzer.code, tags


def add_open_graph(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """What other sites show of a page that is linked to: its title, and its first paragraph."""
    said = doctree.next_node(nodes.paragraph) if doctree is not None else None
    words = " ".join(said.astext().split())[:200] if said is not None else ""
    shown = {
        "site_name": "nestopt",
        "type": "website",
        "title": re.sub("<.*?>", "", context.get("title", "")),
        "description": words,
    }
    tags = (f'<meta property="og:{key}" content="{html.escape(value)}" />' for key, value in shown.items() if value)
    context["metatags"] = "\n".join([context.get("metatags", ""), *tags])


def setup(app: Sphinx) -> None:
    """Connect the hooks above."""
    app.connect("builder-inited", find_homes)
    app.connect("builder-inited", write_levels)
    app.connect("builder-inited", write_keys)
    app.connect("builder-inited", write_limits)
    app.connect("builder-inited", measure_levels)
    app.connect("builder-inited", write_gallery)
    app.connect("autodoc-process-docstring", describe_fields, priority=300)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon's 500
    app.connect("html-page-context", add_open_graph)
    app.connect("missing-reference", resolve_home, priority=400)
    app.connect("viewcode-find-source", add_public_names)
