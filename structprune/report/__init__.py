"""What a run tells: report.json, the model card, plots."""
