"""What users read of their cache: counters, summaries, pictures, audits, and what would be cached and why."""
