"""The report: everything a run left is on one page that asks the network for nothing, however early the run ended."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from raytx.report import MAX_POINTS, number, size_text, thinned, write_report

PLAN: dict[str, Any] = {
    "recipe": {
        "name": "small",
        "model": {"type": "decoder"},
        "data": {"type": "text-files", "path": "<script>alert('data')</script>"},
        "strategy": {"type": "ddp"},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
    },
    "layout": {"data_parallel_size": 2},
    "gradient_accumulation_steps": 2,
    "steps": 30,
    "metric": "perplexity",
    "size": {"parameters": 1_234_567},
    "memory": [{"parameters": 17}, {"parameters": 4_938_268}],
}


def log(run_dir: Path, *records: dict[str, Any], tail: str = "") -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")


def step(number: int, **values: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "loss": 5 - number / 10,
        "grad_norm": 1.0,
        "lr": 0.1,
        "tokens_per_s": 900,
    } | values


def page(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """Return the content of a section, or nothing where there is none."""
    found = re.search(rf"<section><h2>{title}</h2>(.*?)</section>", text, re.DOTALL)
    return found.group(1) if found else ""


def cells(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]


class Complete(HTMLParser):
    """Checks that every element is closed in its turn."""

    VOID = {"meta", "br", "hr", "img", "input", "link"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [
            value or "" for name, value in attributes if name in {"src", "href", "xlink:href", "data", "action"}
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (tmp_path / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.13"}}))
    (tmp_path / "parity.json").write_text(json.dumps({"ddp": {"loss": 1.5e-7, "grad_norm": 0.0}}))
    (tmp_path / "compression.json").write_text(json.dumps([{"type": "l1-pruning", "relative_error": 0.02}]))
    artifact = tmp_path / "artifacts" / "hf"
    artifact.mkdir(parents=True)
    manifest = {
        "exporter": {"type": "hf"},
        "compression": [{"type": "l1-pruning"}],
        "golden_difference": 3.1e-7,
        "metrics": {"perplexity": 7.5},
        "files": {"a": {"bytes": 1_500_000}, "b": {"bytes": 500_000}},
    }
    (artifact / "artifact.json").write_text(json.dumps(manifest))
    log(
        tmp_path,
        {"kind": "baseline", "name": "unigram entropy of the corpus", "step": 0, "loss": 4.5, "perplexity": 90.0},
        *[step(n) for n in range(1, 11)],
        {"kind": "resumed", "step": 10},
        *[step(n) for n in range(11, 31)],
        {"kind": "eval", "step": 15, "loss": 3.6, "perplexity": 36.6},
        {"kind": "eval", "step": 30, "loss": 2.1, "perplexity": 8.17},
    )
    return tmp_path


def test_the_page_is_complete_and_asks_the_network_for_nothing(whole: Path) -> None:
    text = page(whole)
    parser = Complete()
    parser.feed(text)
    assert parser.open == []
    assert all(link.startswith("#") for link in parser.links)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<img", text)


def test_plots_are_inline_drawings_in_the_colours_of_the_page(whole: Path) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page(whole), re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "var(--first)" in drawing
        assert not re.search(r"#0[1-6]0[1-6]0[1-6]", drawing), "a placeholder colour was left"


def test_what_a_run_wrote_is_escaped(whole: Path) -> None:
    text = page(whole)
    assert "<script>" not in text
    assert "&lt;script&gt;alert(" in section(text, "Recipe")


def test_the_evaluation_table_ends_with_what_had_to_be_beaten(whole: Path) -> None:
    assert cells(section(page(whole), "Evaluation")) == [
        ["step", "loss", "perplexity"],
        ["15", "3.600", "36.60"],
        ["30", "2.100", "8.170"],
        ["unigram entropy of the corpus", "4.500", "90.00"],
    ]


def test_parity_compression_and_artifacts_have_their_tables(whole: Path) -> None:
    text = page(whole)
    assert cells(section(text, "Parity of strategies: largest relative differences")) == [
        ["strategy", "loss", "grad_norm"],
        ["ddp", "1.50e-07", "0"],
    ]
    assert cells(section(text, "Compression"))[1] == ["l1-pruning", "0.02000"]
    head, row = cells(section(text, "Artifacts"))
    assert dict(zip(head, row, strict=True)) == {
        "artifact": "hf",
        "format": "hf",
        "compression": "l1-pruning",
        "files": "2",
        "size": "2.0 MB",
        "golden difference": "3.10e-07",
        "perplexity": "7.500",
    }


def test_the_head_says_how_far_the_run_came_and_the_figures_that_matter(whole: Path) -> None:
    head = page(whole).partition("</header>")[0]
    assert "30 of 30 steps" in head
    assert "resumed at step 10" in head
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", head))
    assert figures == {
        "train loss": "2.000",
        "held-out loss": "2.100",
        "held-out perplexity": "8.170",
        "unigram entropy of the corpus": "4.500",
        "tokens/s (median)": "900",
        "parameters": "1,234,567",
    }


@pytest.mark.parametrize("nodes", [["a"], ["a", "b"], ["a", "a", "b", "b"]], ids=len)
def test_the_ranks_are_those_of_the_last_attempt_on_however_many_workers(whole: Path, nodes: list[str]) -> None:
    log(whole, {"kind": "placed", "step": 30, "nodes": nodes})
    found = [row[:2] for row in cells(section(page(whole), "Ranks"))]
    assert found[1:] == [[node, str(rank)] for rank, node in enumerate(nodes)]


def test_ranks_that_make_no_whole_copies_of_the_model_are_not_shown(whole: Path) -> None:
    plan = PLAN | {"layout": {"data_parallel_size": 1, "pipeline_parallel_size": 2}}
    (whole / "plan.json").write_text(json.dumps(plan))
    log(whole, {"kind": "placed", "step": 30, "nodes": ["a", "a", "b"]})
    assert section(page(whole), "Ranks") == ""


def test_the_environment_is_listed_with_dotted_names(whole: Path) -> None:
    assert ["packages.torch", "2.13"] in cells(section(page(whole), "Environment"))


def test_an_empty_directory_gives_a_page_that_says_so(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "no step was recorded" in text
    assert "<section>" not in text


def test_a_run_killed_early_gives_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN)[:40])
    log(tmp_path, step(1), step(2), tail='{"kind": "step", "st')
    text = page(tmp_path)
    assert "2 steps" in text
    assert text.count("<svg") == 4
    assert section(text, "Evaluation") == ""


def test_a_run_that_diverged_is_drawn_without_its_infinite_steps(tmp_path: Path) -> None:
    log(tmp_path, step(1), step(2, loss=float("nan"), grad_norm=float("inf")))
    assert page(tmp_path).count("<svg") == 4


def test_a_step_done_again_counts_once_with_its_last_values(tmp_path: Path) -> None:
    log(tmp_path, step(1), step(2, loss=9.0), {"kind": "resumed", "step": 1}, step(2, loss=3.0))
    head = page(tmp_path).partition("</header>")[0]
    assert "<dt>train loss</dt><dd>3.000</dd>" in head


def test_samples_per_second_are_shown_where_there_are_no_tokens(tmp_path: Path) -> None:
    log(tmp_path, {"kind": "step", "step": 1, "loss": 1.0, "samples_per_s": 5.0})
    assert page(tmp_path).count("<svg") == 2


def test_the_same_run_gives_the_same_page(whole: Path) -> None:
    assert page(whole) == page(whole)


def test_long_curves_are_averaged_in_groups() -> None:
    points = [(n, float(n % 2)) for n in range(10 * MAX_POINTS)]
    drawn = thinned(points)
    assert len(drawn) == MAX_POINTS
    assert {value for _, value in drawn} == {0.5}
    assert drawn[-1][0] == points[-1][0]
    assert thinned(points[:5]) == points[:5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (27.3, "27.30"),
        (9003.4, "9,003"),
        (12345.6, "12,346"),
        (0.00213, "0.002130"),
        (3.1e-7, "3.10e-07"),
        (float("nan"), "nan"),
        (True, "true"),
        (None, ""),
        ("<b>", "&lt;b&gt;"),
    ],
)
def test_numbers_read_well(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (21.8e6, "21.8 MB"), (5e12, "5.0 TB")]
)
def test_sizes_read_well(count: float, text: str) -> None:
    assert size_text(count) == text
