"""Names of the files in a run folder."""

EXPERIMENT, ENVIRONMENT, METRICS, RESULT = "experiment.json", "environment.json", "metrics.jsonl", "result.json"
BEFORE, SIMILARITY, TRACKED, REPORT = "before.json", "similarity.json", "tracked.json", "report.html"
EVALUATION = "evaluation.json"
