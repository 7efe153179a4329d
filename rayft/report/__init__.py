"""Records in, page out: report.html, trials.csv and an Optuna storage. No torch in here."""
