"""An HTML page about a run, or about several runs to compare them."""
