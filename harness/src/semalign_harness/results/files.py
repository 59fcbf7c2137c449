"""Names of the files that runs, evaluations and comparisons write."""

from typing import Any

EXPERIMENT, ENVIRONMENT, METRICS, RESULT = "experiment.json", "environment.json", "metrics.jsonl", "result.json"
BEFORE, SIMILARITY, ENTRIES = "before.json", "similarity.json", "entries.json"
TRACKED, REPORT = "tracked.json", "report.html"
EVALUATION, COMPARISON = "evaluation.json", "comparison.json"
EVALUATION_FOLDERS = {
    "source": "evaluation-source",
    "target before": "evaluation-target",
    "target after": "evaluation",
}
"""Folders inside a run or comparison that hold the evaluations of its models."""
_RENAMED = {"figure": "headline", "figures": "metrics"}


def with_present_keys(value: Any, *, inside: bool = False) -> Any:
    """Return the JSON of a result with the keys of this version; only files have a format version now."""
    if isinstance(value, list):
        return [with_present_keys(item, inside=True) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: item for key, item in value.items() if key != "version" or not inside}
    return {_RENAMED.get(key, key): with_present_keys(item, inside=True) for key, item in kept.items()}
