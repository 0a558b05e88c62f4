"""The page of evidence: it names every claim, and shows what its commands have printed."""

import re
from pathlib import Path

from nestopt.evidence.claims import CLAIMS

DOCS = Path(__file__).parents[2] / "docs"


def test_every_claim_is_there_with_a_verdict_of_its_command() -> None:
    page = (DOCS / "evidence.md").read_text()
    for name, claim in CLAIMS.items():
        assert f"| `{name}` |" in page
        found = re.search(rf"`(nestopt evidence {name}(?: --quick)?)`:\n\n```{{literalinclude}} (\S+)\n", page)
        assert found is not None, name
        command, shown = found.groups()
        lines = (DOCS / shown).read_text().splitlines()
        (verdict,) = [line for line in lines if line.startswith(f"claim {name}: {claim.says}. verdict: ")]
        quick = command.endswith("--quick")
        assert re.search(r"; 1 seed, and 3 are needed\)$" if quick else r"; [35] seeds\)$", verdict)
        assert lines[-1] == f"in evidence/{name}{'-quick' if quick else ''}: evidence.json, evidence.png"
