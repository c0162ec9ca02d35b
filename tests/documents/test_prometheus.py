"""The mapping for Prometheus's statsd exporter has one rule for each metric of the library."""

import re
from typing import Any

import pytest
import yaml

from documents.pages import DOCS, blocks, first_cells, section
from idempotent_consumer.metrics import BOUNDS_S

KINDS = {"Counters": "counter", "Timers": "observer", "Gauge": "gauge", "What is held": "gauge"}
METRICS = [
    (kind, "service" if heading == "What is held" else "noun", cell.partition("_")[2])
    for heading, kind in KINDS.items()
    for cell in first_cells(section(DOCS / "signals.md", heading))
]
"""The metrics in the page of signals, which test_reference.py compares with the code."""

NAMES = {
    "noun": ["orders", "new_orders_2", "orders_processed", "failed", "x_sent"],
    "service": ["order", "new-order"],
}

(_BLOCK,) = blocks(DOCS / "prometheus.md", "yaml")
MAPPING = yaml.safe_load(_BLOCK)
RULES: list[dict[str, Any]] = [MAPPING["defaults"] | rule for rule in MAPPING["mappings"]]


def mapped(kind: str, sent: str) -> list[tuple[str, dict[str, str]]]:
    """Return the name and the labels that each matching rule gives a metric.

    As in the exporter, a rule matches anywhere in a name, for one kind of metric.
    """
    return [
        (
            rule["name"],
            {
                label: found.expand(re.sub(r"\$(\d)", r"\\\1", template))
                for label, template in rule["labels"].items()
            },
        )
        for rule in RULES
        if rule["match_type"] == "regex" and rule["match_metric_type"] == kind
        if (found := re.search(rule["match"], sent, re.ASCII))
    ]


@pytest.mark.parametrize(("kind", "label", "metric"), METRICS)
def test_each_metric_has_one_rule_and_its_sender_as_a_label(
    kind: str, label: str, metric: str
) -> None:
    for sender in NAMES[label]:
        for prefix in ("", "shop.eu."):
            ((_, labels),) = mapped(kind, f"{prefix}{sender}_{metric}")
            assert labels.pop(label) == sender
            assert set(labels.values()) <= {metric}


def test_no_two_metrics_share_a_series() -> None:
    series = [str(mapped(kind, f"orders_{metric}")) for kind, _, metric in METRICS]
    assert len(set(series)) == len(series) == 22
    assert mapped("counter", "orders_other") == []


def test_the_buckets_of_ages_are_the_services_own() -> None:
    (rule,) = (rule for rule in RULES if "duplicate_age" in rule["match"])
    assert rule["histogram_options"]["buckets"] == list(BOUNDS_S.values())
