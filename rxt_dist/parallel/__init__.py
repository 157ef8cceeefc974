"""How the run is spread over processes."""
