"""The mapping for Prometheus's exporter has a rule for each metric that the library sends."""

import re
from typing import Any

import pytest
import yaml

from documents.pages import DOCS, blocks, first_cells, section
from idempotent_consumer.metrics import BOUNDS_S

SIGNALS = DOCS / "signals.md"
KINDS = {"Counters": "counter", "Timers": "observer", "Gauge": "gauge"}
METRICS = [
    (kind, cell.partition("_")[2])
    for heading, kind in KINDS.items()
    for cell in first_cells(section(SIGNALS, heading))
]
"""The page of signals has those that the code sends, as test_reference.py checks."""

(_BLOCK,) = blocks(DOCS / "prometheus.md", "yaml")
RULES: list[dict[str, Any]] = yaml.safe_load(_BLOCK)["mappings"]


def mapped(kind: str, sent: str) -> list[tuple[str, dict[str, str]]]:
    """Return the name and the labels that each rule gives a metric that it matches.

    As the exporter does it: a rule is found anywhere in a name, and is for one kind of metric.
    """
    return [
        (rule["name"], {label: found.expand(_python(v)) for label, v in rule["labels"].items()})
        for rule in RULES
        if rule["match_type"] == "regex" and rule["match_metric_type"] == kind
        if (found := re.search(rule["match"], sent, re.ASCII))
    ]


def _python(template: str) -> str:
    return re.sub(r"\$(\d)", r"\\\1", template)


@pytest.mark.parametrize("prefix", ["", "shop.eu."])
@pytest.mark.parametrize("noun", ["orders", "new_orders_2", "orders_processed", "failed", "x_sent"])
@pytest.mark.parametrize(("kind", "metric"), METRICS)
def test_each_metric_has_one_rule_and_its_noun_is_a_label(
    kind: str, metric: str, noun: str, prefix: str
) -> None:
    ((_, labels),) = mapped(kind, f"{prefix}{noun}_{metric}")
    assert labels.pop("noun") == noun
    assert set(labels.values()) <= {metric}


@pytest.mark.parametrize("prefix", ["", "shop.eu."])
@pytest.mark.parametrize("gauge", first_cells(section(SIGNALS, "What is held")))
def test_each_gauge_of_what_is_held_has_one_rule(gauge: str, prefix: str) -> None:
    what = gauge.removeprefix("order_")
    expected = [("events_held", {"service": "new-order", "what": what})]
    assert mapped("gauge", f"{prefix}new-order_{what}") == expected


def test_no_two_metrics_become_one_series() -> None:
    series = [str(mapped(kind, f"orders_{metric}")) for kind, metric in METRICS]
    assert len(set(series)) == len(series) == 16
    assert mapped("counter", "orders_other") == []


def test_the_buckets_of_the_ages_are_those_that_the_service_shows() -> None:
    (rule,) = (rule for rule in RULES if "duplicate_age" in rule["match"])
    assert rule["histogram_options"]["buckets"] == list(BOUNDS_S.values())
