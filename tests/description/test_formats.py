"""What a description looks like: table, data, Mermaid and SVG."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from nestopt.core.compose import Chain, chain, parallel
from nestopt.core.nesting import nest
from nestopt.description import Description, Memory, describe
from nestopt.description.rows import direct
from nestopt.description.text import shorten, size, width
from nestopt.levels import adam, delta_momentum, momentum, muon, titans

SVG = "{http://www.w3.org/2000/svg}"


def transformer() -> Description:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    return describe(model, torch.optim.AdamW(model.parameters()))


def deep() -> Description:
    slow = Chain([adam(), delta_momentum(period=4)], period=16)
    stack = parallel(fast=chain(momentum(), muon()), slow=slow, odd=nest(momentum(period=64), adam()))
    return describe(stack, shape=(64, 32))


EXAMPLES = [transformer, deep, lambda: describe(titans(rule=adam()), context="tokens"), lambda: describe(adam())]


@pytest.mark.parametrize("make", EXAMPLES)
def test_tables_are_aligned_and_fit(make: Callable[[], Description]) -> None:
    found = make()
    lines = str(found).splitlines()
    assert max(map(width, lines)) <= 110
    head = next(line for line in lines if line.startswith("level "))
    body = lines[4 : 4 + sum(map(len, found.rows()))]
    for column in ("name", "frequency", "memory", "objective", "rule"):
        at = head.index(column)
        assert all(line[at - 1] == " " and line[at] != " " for line in body)
    assert [int(line[:5]) for line in body if line[:5].strip()] == list(range(1, len(found.levels) + 1))


def test_repeated_memories_share_a_row_with_their_sum() -> None:
    found = describe(nn.ModuleList(nn.LSTM(3, 5) for _ in range(12)))
    line = next(line for line in str(found).splitlines() if "× 12" in line)
    assert line.split()[1:4] == ["*", "×", "12"]
    assert line.endswith("120   480 B")


def test_only_indices_that_differ_give_way_to_a_star() -> None:
    memories = [Memory(f"towers.0.blocks.{i}.x", "tokens", 1) for i in range(2)]
    assert [row.memory.name for row in Description.of("", memories).rows()[0]] == ["towers.0.blocks.*.x"]
    other = [*memories, Memory("towers.0.blocks.2.x", "tokens", 1, rule="other")]
    assert len(Description.of("", other).rows()[0]) == 2


def test_the_last_line_holds_the_totals() -> None:
    model = nn.Linear(100, 10)
    text = str(describe(model, torch.optim.AdamW(model.parameters())))
    assert text.endswith("3 memories on 2 levels · 1,010 weights (4.0 kB) · 8.1 kB of state")


def test_data_is_plain_and_complete() -> None:
    found = transformer()
    data = json.loads(json.dumps(found.to_data()))
    assert data == found.to_data()
    assert [entry["name"] for entry in data] == [memory.name for memory in found.memories]
    assert [entry["level"] for entry in data] == [i for i, level in enumerate(found.levels, 1) for _ in level]
    assert data[0]["needs"] == ["adamw.exp_avg", "adamw.exp_avg_sq"]
    assert data[0]["frequency"] == "every step"


# -- Mermaid -----------------------------------------------------------------------------------------------------------

NODE = re.compile(r'^    (m\d+)\["([^"]*)"\]$')
LINK = re.compile(r"^  (m\d+) (-->\|needs\||~~~) (m\d+)$")
OTHER = re.compile(r'^(flowchart TB|  subgraph L\d+\["[^"]*"\]|  end)$')


@pytest.mark.parametrize("make", EXAMPLES)
def test_mermaid_is_well_formed(make: Callable[[], Description]) -> None:
    found = make()
    lines = found.to_mermaid().splitlines()
    assert all(NODE.match(line) or LINK.match(line) or OTHER.match(line) for line in lines)
    ids = [match[1] for line in lines if (match := NODE.match(line))]
    assert len(set(ids)) == len(ids) == sum(map(len, found.rows()))
    assert sum(line.startswith("  subgraph") for line in lines) == len(found.levels) == lines.count("  end")
    for line in lines:
        if match := LINK.match(line):
            assert {match[1], match[3]} <= set(ids)


def test_mermaid_arrows_lead_from_slow_to_what_it_needs() -> None:
    lines = describe(chain(momentum(), muon())).to_mermaid().splitlines()
    by_id = {match[1]: match[2].split("<br/>")[0] for line in lines if (match := NODE.match(line))}
    links = [LINK.match(line) for line in lines]
    assert [(by_id[m[1]], m[2], by_id[m[3]]) for m in links if m] == [("chain.muon", "-->|needs|", "chain.momentum")]


def test_arrows_that_others_imply_are_left_out() -> None:
    assert direct([(0, 1), (1, 2), (0, 2), (3, 2)]) == [(0, 1), (1, 2), (3, 2)]


NASTY = """<b>&"quoted" `md` *x* [a](b) #35; ]] --> \x00\n%%{init}%%"""


def nasty() -> Description:
    return Description.of(NASTY, [Memory(NASTY, "tokens", 1, NASTY, NASTY, NASTY)], [NASTY])


def test_mermaid_escapes_text() -> None:
    lines = nasty().to_mermaid().splitlines()
    label = next(match[2] for line in lines if (match := NODE.match(line)))
    assert not set('<>"`*&%\x00') & set(label.replace("<br/>", ""))
    assert "#60;b#62;" in label


# -- SVG ---------------------------------------------------------------------------------------------------------------


def boxes(root: ET.Element) -> list[tuple[float, float, float, float]]:
    return [
        (x, y, x + wide, y + high)
        for rect in root.iter(f"{SVG}rect")
        for x, y, wide, high in [[float(rect.get(key, 0)) for key in ("x", "y", "width", "height")]]
    ]


@pytest.mark.parametrize("make", EXAMPLES)
def test_svg_is_well_formed_and_nothing_overlaps(make: Callable[[], Description]) -> None:
    found = make()
    root = ET.fromstring(found.to_svg())
    placed = boxes(root)
    wide, high = float(root.get("width", 0)), float(root.get("height", 0))
    assert len(placed) == sum(map(len, found.rows()))
    assert all(x0 >= 0 and y0 >= 0 and x1 <= wide and y1 <= high for x0, y0, x1, y1 in placed)
    for a, b in itertools.combinations(placed, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    texts = [(float(text.get("x", 0)), float(text.get("y", 0))) for text in root.iter(f"{SVG}text")]
    assert all(0 <= x <= wide and 0 < y < high for x, y in texts)
    assert len(set(texts)) == len(texts)


def test_arrows_pass_between_boxes() -> None:
    root = ET.fromstring(deep().to_svg())
    arrows = [path.get("d", "") for path in root.iter(f"{SVG}path") if path.get("class") == "need"]
    straight = re.compile(r"(\S+),(\S+) L(\S+),(\S+)")
    passed = [tuple(map(float, found)) for d in arrows for found in straight.findall(d.replace("M", ""))]
    assert any(y1 - y0 > 50 for _, y0, _, y1 in passed)
    for x0, y0, x1, y1 in passed:
        for left, top, right, bottom in boxes(root):
            assert x1 <= left or x0 >= right or y1 <= top or y0 >= bottom


def test_the_fastest_level_is_on_top() -> None:
    root = ET.fromstring(describe(parallel(momentum(), adam(period=16))).to_svg())
    bands = [(float(t.get("y", 0)), t.text) for t in root.iter(f"{SVG}text") if t.get("class") == "band"]
    assert [text for _, text in sorted(bands)] == ["every step", "every 16 steps"]


def test_svg_escapes_text_and_stands_alone() -> None:
    drawn = nasty().to_svg()
    root = ET.fromstring(drawn)
    assert root.find(f"{SVG}title").text.startswith('<b>&"quoted"')  # type: ignore[union-attr]
    assert "<b>" not in drawn
    assert "href" not in drawn
    assert nasty()._repr_svg_() == drawn


@given(st.lists(st.text(max_size=60), min_size=1, max_size=9, unique=True))
def test_any_names_make_a_valid_picture_and_table(names: list[str]) -> None:
    found = Description.of(names[0], [Memory(name, "gradients", 1, name, name, name) for name in names])
    assert len(boxes(ET.fromstring(found.to_svg()))) == sum(map(len, found.rows()))
    assert all(
        NODE.match(line) or LINK.match(line) or OTHER.match(line) for line in found.to_mermaid().split("\n")[:-1]
    )
    assert len(str(found)) > 0


# -- words -------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=40), st.integers(1, 40))
def test_shortened_text_fits_and_keeps_its_ends(text: str, columns: int) -> None:
    short = shorten(text, columns)
    assert width(short) <= columns
    assert short == text if width(text) <= columns else "…" in short


def test_shortening_keeps_both_ends() -> None:
    assert shorten("encoder.layers.0.self_attention", 15) == "encoder…tention"


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (49_400, "49.4 kB"), (999_960, "1.0 MB"), (7 * 10**9, "7.0 GB")],
)
def test_sizes_read_well(number: int, words: str) -> None:
    assert size(number) == words


def test_names_given_twice_are_refused() -> None:
    with pytest.raises(ValueError, match=r"given twice: \['a'\]"):
        Description.of("", [Memory("a", "tokens", 1), Memory("a", "gradients", 1)])
