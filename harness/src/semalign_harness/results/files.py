"""Names of the files in a run folder."""

EXPERIMENT, RESULT, METRICS = "experiment.json", "result.json", "metrics.jsonl"


ENVIRONMENT, REPORT = "environment.json", "report.html"


TRACKED = "tracked.json"


BEFORE, SIMILARITY = "before.json", "similarity.json"
