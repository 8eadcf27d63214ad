"""Studies: what the scores, thresholds and trainings do on real public data (`GRADSHIELD_DATA`)."""
