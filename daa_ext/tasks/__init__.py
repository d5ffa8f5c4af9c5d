"""Task files for lm-evaluation-harness; docs/scoring.md has their sources and columns."""
