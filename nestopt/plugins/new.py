"""`nestopt plugins new NAME`: a package with a plugin, whose tests pass as it is written."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from nestopt._version import VERSION
from nestopt.config import ConfigError
from nestopt.config.files import making
from nestopt.core.registry import WORDS, registry
from nestopt.plugins import templates


def write(name: str, kind: str, out: Path) -> str:
    """Write the package `nestopt-NAME` into a new folder of `out`.

    Args:
        name: what is registered; the distribution's and the module's names are made of it.
        kind: of what it registers (`templates.KINDS`).
        out: a folder.

    Returns:
        What was written, and what to do next.

    Raises:
        ConfigError: a name that can't be one, or that is taken; a folder that is there already, or can't be made.
    """
    given, name = name, re.sub(r"[-.\s]+", "_", name.removeprefix("nestopt-")).lower()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name) or name.endswith("_"):
        raise ConfigError.refuse("NAME", given, "give letters, digits and '-', a letter first, such as sign-momentum")
    registered = name.replace("_", "-") if kind in WORDS else name
    if registered in registry.names(kind):
        owner = registry.owner(kind, registered)
        raise ConfigError.refuse("NAME", given, f"the {kind} {registered!r} is there already (plugin {owner!r})")
    if not out.is_dir():
        raise ConfigError.refuse("--out", str(out), "give a folder that is there")
    folder = out / f"nestopt-{name.replace('_', '-')}"
    files = _files(name, registered, kind)
    try:
        with making(folder) as made:
            for path, text in files.items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise ConfigError.refuse("NAME", given, f"{folder} is there already; remove it, or give another name") from None
    rows = "\n".join(f"  {path}" for path in files)
    return f"{folder}:\n{rows}\nNow: cd {folder} && pip install -e '.[test]' && pytest && nestopt plugins"


def _files(name: str, registered: str, kind: str) -> dict[str, str]:
    hook, code, imports, tests, use = templates.HOOKS[kind]
    cls = "".join(word.capitalize() for word in name.split("_"))
    words = {
        "name": name,
        "registered": registered,
        "cls": cls,
        "kind": kind,
        "module": f"nestopt_{name}",
        "dist": f"nestopt-{name.replace('_', '-')}",
        "title": f"{'An' if kind[0] in 'aeio' else 'A'} {kind.replace('_', ' ')}, {registered},",
        "version": VERSION,
        "extra": "[train]" if kind in ("callback", "logger") else "",
    }
    words["imports"], words["use"] = imports, Template(use).substitute(words)
    words["tests"] = Template(tests).substitute(words)
    body = Template(code).substitute(words)
    what = name if kind == "model" else cls
    body += f'\n\n@nestopt.hookimpl\ndef {hook}(register):\n    register("{registered}", {what})\n'
    files = {
        "pyproject.toml": templates.PYPROJECT,
        "README.md": templates.README,
        f"tests/test_{name}.py": templates.TESTS,
        ".github/workflows/tests.yml": templates.CI,
    }
    doc = f'"""{words["title"].rstrip(",")}: a plugin of nestopt."""\n\n'
    return {f"nestopt_{name}.py": doc + body} | {path: Template(text).substitute(words) for path, text in files.items()}
