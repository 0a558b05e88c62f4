"""pytest#1479 (plugins silently stop on ImportError), flake8#1268, airflow#60498 (a duplicate name stops all later
plugins), tendenci#252 (one broken plugin takes all down): entry points that fail to import, sys.exit, take a taken
name, hang on a wrong hook.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

d = pathlib.Path(tempfile.mkdtemp())


def dist(name, code, points):
    (d / f"{name.replace('-', '_')}.py").write_text(code)
    i = d / f"{name.replace('-', '_')}-1.0.dist-info"
    i.mkdir()
    (i / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (i / "entry_points.txt").write_text("[nestopt]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))


lvl = "import nestopt\nclass L(nestopt.Level):\n    def init(self, param): return {}\n    def step(self, grad, state, signal): return grad, {}\n"
hook = "@nestopt.hookimpl\ndef nestopt_register_levels(register): register('%s', L)\n"
dist("aa-broken", "import not_there\n", {"aa": "aa_broken"})
dist("ab-exits", "import sys; sys.exit(3)\n", {"ab": "ab_exits"}) if "exit" in sys.argv or True else 0
dist("ac-taken", lvl + hook % "muon", {"ac": "ac_taken"})
dist("ad-syntax", "def (:\n", {"ad": "ad_syntax"})
dist("ae-wronghook", lvl + "@nestopt.hookimpl\ndef nestopt_register_level(register): pass\n", {"ae": "ae_wronghook"})
dist("zz-good", lvl + hook % "zzgood", {"zz": "zz_good"})
dist("zy-same", lvl + hook % "zysame", {"zz": "zy_same"})
bad = []
code = "import nestopt, torch; print(sorted(p.name + ('!' if p.error else '') for p in nestopt.registry.plugins())); p = torch.nn.Parameter(torch.ones(3, 3)); nestopt.optim.Nested([p], 'muon'); nestopt.optim.Nested([p], 'zzgood'); print('fine')"
for label, env in {
    "all": {},
    "without the one that exits": {"NESTOPT_DISABLE_PLUGINS": "ab"},
    "none": {"NESTOPT_DISABLE_PLUGINS": "all"},
}.items():
    r = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": str(d), **env},
        capture_output=True,
        text=True,
    )
    print(
        label,
        "rc",
        r.returncode,
        r.stdout.strip()[-400:],
        "|",
        r.stderr.strip().splitlines()[-1:] if r.returncode else "",
    )
    if label != "none" and r.returncode:
        bad.append((label, r.returncode))
print(bad or "ok")
sys.exit(bool(bad))
