"""What a run shows of itself: Prometheus metrics, the metrics file, log lines and curves."""
