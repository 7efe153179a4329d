"""What a run or a sweep leaves behind for people and for report/: run.json, sweep.json,
trials.jsonl and metrics.jsonl. No torch in here."""
