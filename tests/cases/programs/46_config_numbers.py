"""LlamaFactory#4014, h2o-llmstudio#699, allennlp#1429, confuse#91: YAML 1.1 reads 1e-3 as text; also 1_000, .5,
on/off, octal, infinities, and a file's oddities (BOM, CRLF, tabs, empty, two documents).
"""

import pathlib
import sys
import tempfile

import nestopt

bad = []
d = pathlib.Path(tempfile.mkdtemp())


def load(t, raw=None):
    f = d / "x.yaml"
    f.write_bytes(raw if raw is not None else t.encode())
    return nestopt.load(f)


def lr(text):
    return load(f"optimizer: {{lr: {text}, stack: muon}}").optimizer.lr


for text, want in {
    "1e-3": 1e-3,
    "1E-3": 1e-3,
    "2e3": 2000.0,
    "1.e-3": 1e-3,
    "+1e-3": 1e-3,
    ".5": 0.5,
    "'1e-3'": None,
}.items():
    try:
        v = lr(text)
        if (want is not None and v != want) or not isinstance(v, float):
            bad.append(("lr", text, v))
    except Exception as e:
        if want is not None:
            bad.append(("lr", text, type(e).__name__, str(e)[:120]))
for text in (".inf", ".nan", "-1", "yes", "null", "[1e-3]"):
    try:
        v = lr(text)
        bad.append(("accepted", text, v)) if text != "null" else print("lr: null ->", v)
    except Exception as e:
        if type(e).__name__ != "ConfigError":
            bad.append((text, repr(e)[:120]))
try:
    v = nestopt.load({"optimizer": {"stack": "muon"}}, ["optimizer.lr=1e-3"]).optimizer.lr
    if v != 1e-3:
        bad.append(("override", v))
    lvl = nestopt.load({"level": "adam", "eps": "1e-8"})
    if not isinstance(lvl.eps, float):
        bad.append(("level eps", repr(lvl.eps)))
except Exception as e:
    print("level eps as text:", str(e)[:150])
t = load("", b"level: adam\neps: 1e-6\n")
if not isinstance(t.eps, float) or t.eps != 1e-6:
    bad.append(("level eps in YAML", repr(t.eps)))
try:
    lvl = load("level: momentum\nbeta: 1e-1\nperiod: 1e1\n")
    if not isinstance(lvl.period, int) and lvl.period != 10:
        bad.append(("period 1e1", lvl.period))
except Exception as e:
    print("period: 1e1 ->", type(e).__name__, str(e)[:100])
for name, raw in {
    "BOM": b"\xef\xbb\xbfoptimizer: {lr: 0.1}\n",
    "CRLF": b"optimizer:\r\n  lr: 0.1\r\n",
    "tab": b"optimizer:\n\tlr: 0.1\n",
    "empty": b"",
    "comments": b"# nothing\n",
    "two documents": b"optimizer: {lr: 0.1}\n---\noptimizer: {lr: 0.2}\n",
    "utf-16": "optimizer: {lr: 0.1}".encode("utf-16"),
    "scalar": b"3\n",
    "twice": b"optimizer: {lr: 0.1, lr: 0.2}\n",
    "merge": b"a: &a {lr: 0.1}\noptimizer: {<<: *a}\n",
    "python tag": b"optimizer: !!python/object/apply:os.system ['true']\n",
}.items():
    try:
        c = load("", raw)
        print(name, "->", getattr(getattr(c, "optimizer", None), "lr", c))
    except Exception as e:
        print(name, "->", type(e).__name__, str(e).replace("\n", " ")[:110])
        if type(e).__name__ != "ConfigError" or name in ("BOM", "CRLF"):
            bad.append((name, repr(e)[:140]))
print(bad or "ok")
sys.exit(bool(bad))
