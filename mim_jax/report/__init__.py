"""An HTML page about a run, or about several to compare them."""
